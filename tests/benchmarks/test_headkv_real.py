"""`benchmarks.headkv_real`: its prompts are whole questions, and its numbers are paired."""

import json
from dataclasses import replace

import numpy as np
from meshes import GQA, WINDOWED, toy
from tokenizer_toys import CHAT, byte_level

from benchmarks.headkv_prompts import (
    CUE,
    QUOTED,
    TASKS,
    Source,
    make_prompts,
    without_beginning,
    write_prompts,
)
from benchmarks.headkv_real_report import compared, report
from benchmarks.hidden import right_answers
from kvjax import policies
from kvjax.example import Example
from kvjax.generation import generate
from kvjax.scoring import compare


def test_prompts_end_with_their_questions(tmp_path):
    said = "The {} river passed the old mill and the {} road before it came to the sea.\n"
    book = tmp_path / "book.txt"
    book.write_text("".join(said.format(n, n + 1) for n in range(100)))
    row = {"task": "qa1", "input": "Mary went to the office. ", "target": "office"}
    line = json.dumps(row | {"question": "Where is Mary?"}) + "\n"
    for thousands in (1, 2):
        (tmp_path / f"babilong_{thousands}k.jsonl").write_text(line)
    tokenizer = byte_level(chat_template=CHAT)
    source = Source.read(tokenizer, book, tmp_path)
    found = make_prompts(source, 2, seed=3)
    assert [e.name for e in found] == [*TASKS, *TASKS]
    assert (
        found == make_prompts(Source.read(tokenizer, book, tmp_path), 4, seed=3)[: 2 * len(TASKS)]
    )
    write_prompts(found, tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    for example, line in zip(found, map(json.loads, lines), strict=True):
        assert line == {
            "task": example.name,
            "prompt": [*example.prompt],
            "answer": [*example.answer],
        }
        text, answer = tokenizer.decode(example.prompt), tokenizer.decode(example.answer)
        assert answer.strip() in text and 0 < example.question_length < len(example.prompt)
        if example.name == "quote":
            assert (len(example.answer), text.count(tokenizer.decode(example.prompt[-CUE:]))) == (
                QUOTED,
                2,
            )
        if example.name != "place":
            assert len(example.prompt) == 1000
        cut, given = without_beginning(source, example)
        assert (*cut.prompt, *cut.answer) == (*example.prompt, *example.answer)
        assert tokenizer.decode(cut.prompt).endswith("<|assistant|>\n")
        beginning = tokenizer.decode(cut.answer[:given])
        assert given == len(example.prompt) - len(cut.prompt) > 0 and "?" not in beginning


def test_differences_are_paired():
    own, base, whole = (np.asarray(x, float) for x in ([1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]))
    found = compared(own, base, whole)
    assert (found["right"], found["difference"], found["of_full"]) == (0.75, 0.5, 0.75)
    assert found["standard_error"] == round(np.std([0, 1, 0, 1], ddof=1) / 2, 4)
    assert found["of_full_at_least"] == round(0.75 - 1.645 * 0.25, 4)


def test_tasks_that_the_full_cache_fails_do_not_count(tmp_path):
    settings = {
        "tasks": ["a", "b", "c"],
        "kv_sizes": [48],
        "policies": ["full", "headkv", "snapkv"],
        "form": "asked",
    }
    facts = {"date": "", "processor": "", "versions": {}, "commit": "abc", "command": "run"}
    facts |= {"cpu_seconds": 60.0, "lengths": [1000, 2000, 900]}
    lines = [
        {"right": {"full": "110", "headkv 48": bits, "snapkv 48": "000"}, **facts}
        for bits in ("110", "010")
    ]
    out = tmp_path / "result.json"
    rows = [settings | {"lengths": [1000]}, *lines]
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(out, ("a",), "snapkv")
    found = json.loads(out.read_text())
    assert found["prompts"] == {"a": 2, "b": 2, "c": 2, "chosen on": 2, "judged": 2, "all": 4}
    right = {r["group"]: r["right"] for r in found["rows"] if r["policy"] == "headkv"}
    assert right == {"a": 0.5, "b": 1.0, "c": 0.0, "chosen on": 0.5, "judged": 1.0, "all": 0.75}
    assert "| headkv | 75.0 (+75.0 ± 25.0) |" in out.with_suffix(".md").read_text()


def test_hidden_tokens_are_those_that_a_compressed_cache_lacks():
    model, params = toy(GQA, WINDOWED)
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(0, 64, n).tolist()) for n in (40, 33, 36, 40, 39, 31)]
    answers = generate(model, params, prompts, max_new_tokens=1).tokens
    asked = [Example(p, tuple(a), then_eos=False) for p, a in zip(prompts, answers, strict=True)]
    makers = (policies.spankv, policies.adasnapkv)
    every = {f"{make.__name__} {r}": make(ratio=r) for make in makers for r in (0.5, 0.9)}
    found = right_answers(model, params, asked, every, steps=2)
    expected = compare(model, params, asked, every, batch_size=6).right
    assert list(found) == list(expected) and found["full"].all()
    for name, right in expected.items():
        np.testing.assert_array_equal(found[name], right, err_msg=name)
    assert 0 < np.mean(list(expected.values())[1:]) < 1
    # A wrong token counts unless it is given.
    wrong = [replace(e, answer=((e.answer[0] + 1) % 64,)) for e in asked]
    given = [i % 2 for i in range(len(wrong))]
    told = right_answers(model, params, wrong, every, steps=2, given=given)["full"]
    np.testing.assert_array_equal(told, np.asarray(given, bool))
