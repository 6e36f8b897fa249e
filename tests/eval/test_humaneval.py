"""HumanEval and MBPP: right solutions pass in the sandbox, empty ones fail."""

import dataclasses
import gzip
import json
import math

import eval_toys as toys
import pytest
from tokenizer_toys import sentencepiece

import kvjax
from eval import run as running
from eval.prompts import encode
from eval.run import evaluate
from eval.sandbox.confine import Limits
from eval.sandbox.runner import probe, run_many
from eval.task import Settings, TaskOptions
from eval.tasks import code as code_tasks
from eval.tasks.code import humaneval, humaneval_program, mbpp, mbpp_program
from kvjax.generation import Generation
from kvjax.text import ids_after

TIMEOUT = 60

ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(n):\n    """ Twice n. """\n',
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}
MBPP_ROW = {
    "text": "Write a function to double a number.",
    "code": "def double(n):\r\n    return 2 * n",
    "test_setup_code": "four = double(2)",
    "test_list": ["assert double(2) == four", "assert double(3) == 6"],
}


@pytest.fixture(autouse=True)
def confined():
    if probe().refusal():
        pytest.skip(probe().refusal() or "")


@pytest.fixture
def folder(tmp_path):
    rows = [ROW, {**ROW, "task_id": "HumanEval/1"}]
    (tmp_path / "humaneval").mkdir()
    with gzip.open(tmp_path / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    mbpp_rows = [{**MBPP_ROW, "task_id": number} for number in (2, 3, 4, 10, 11, 510, 511)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mbpp_rows))
    return tmp_path


def test_a_problem_is_scored_by_its_tests(folder):
    task = humaneval.load(TaskOptions(folder, settings={"timeout": str(TIMEOUT)}))
    item = task.items[0]
    assert item.id == "HumanEval/0#0"
    assert task.score(item, item.references[0]) == 1
    assert task.score(item, "    return 3 * n\n") == 0
    assert task.score(item, "    import os\n    os._exit(0)\n") == 0
    assert task.score(item, "    return (\n") == 0
    assert task.score(item, "") == 0


def test_a_model_that_is_asked_answers_with_a_code_block(folder):
    task = humaneval.load(TaskOptions(folder, settings={"prompt": "ask", "timeout": str(TIMEOUT)}))
    item, body = task.items[0], "    return 2 * n"
    assert task.chat and "```python\ndef double(n):" in item.prompt and not task.stops
    for answer in (
        f"Here it is:\n```python\ndef double(n):\n{body}\n```\nIt doubles.",
        f"```\n{body}\n```",
        f"def double(n):\n{body}",
    ):
        assert task.score(item, answer) == 1
        assert task.score(item, answer.replace("2", "3")) == 0
    assert task.score(item, "```python\ndef twice(n):\n    return 2 * n\n```") == 0
    with pytest.raises(ValueError, match="prompt=talk, expected one of complete, ask"):
        humaneval.load(TaskOptions(folder, settings={"prompt": "talk"}))


def test_samples_and_summary(folder):
    options = TaskOptions(folder, settings={"samples": "10"})
    items = humaneval.load(options).items
    assert [item.id for item in items[:3]] == [f"HumanEval/0#{i}" for i in range(3)]
    assert len({item.id for item in items}) == 20
    passed = {"HumanEval/0": 3, "HumanEval/1": 0}
    results = [
        (item, "", float(int(item.id.split("#")[1]) < passed[item.meta["problem"]]))
        for item in items
    ]
    found = code_tasks.summary(results)
    assert found["pass@1"] == pytest.approx(0.15)
    assert found["pass@10"] == pytest.approx(0.5)
    assert found["pass@1_standard_error"] == pytest.approx(0.15)
    assert "pass@100" not in found
    assert (found["problems"], found["samples"]) == (2, 10)
    assert "pass@10" not in code_tasks.summary(results[:-1])
    assert math.isclose(code_tasks.summary(results[:10])["pass@1"], 0.3)


def test_limit_counts_problems(folder):
    options = TaskOptions(folder, limit=1, settings={"samples": "2"})
    assert [i.id for i in humaneval.load(options).items] == ["HumanEval/0#0", "HumanEval/0#1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": "0"}, "samples=0, expected a number above 0"),
        ({"timeout": "inf"}, "timeout=inf"),
        ({"max_new_tokens": "x"}, "max_new_tokens=x"),
        ({"speed": "1"}, "unknown setting 'speed'"),
    ],
)
def test_wrong_settings(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        humaneval.load(TaskOptions(folder, settings=settings))


def test_refused_before_anything_is_answered(folder, monkeypatch):
    bare = probe().without(*probe().available)
    monkeypatch.setattr(code_tasks, "probe", lambda: bare)
    with pytest.raises(ValueError, match="--unsafe-execution"):
        humaneval.load(TaskOptions(folder))
    for settings in ({"unsafe": "1"}, {"unsafe_execution": "true"}):
        assert humaneval.load(TaskOptions(folder, settings=settings)).items


def test_mbpp_prompts(folder):
    few, none = (mbpp.load(TaskOptions(folder, shots=shots)) for shots in (None, 0))
    assert [item.id for item in few.items] == ["MBPP/11#0", "MBPP/510#0"]
    prompt = few.items[0].prompt
    assert isinstance(prompt, str)
    assert prompt.count("[BEGIN]\n") == 4 and prompt.count("[DONE]\n") == 3
    assert prompt.endswith("[BEGIN]\n") and "\r" not in prompt
    assert none.items[0].prompt == code_tasks.QUESTION.format(
        text=MBPP_ROW["text"], tests="\n".join(MBPP_ROW["test_list"])
    )
    assert (few.chat, none.chat) == (False, True)
    assert (few.stops, none.stops, none.chat_stops) == (("[DONE]",), (), ())
    with pytest.raises(ValueError, match="got 4 shots, expected 0 to 3"):
        mbpp.load(TaskOptions(folder, shots=4))


def test_mbpp_answers(folder):
    task = mbpp.load(TaskOptions(folder, limit=1, settings={"timeout": str(TIMEOUT)}))
    code = "def double(n):\n    return 2 * n\n"
    for answer in (code, f"Here:\n```python\n{code}```\nIt doubles.", f"[BEGIN]\n{code}[DONE]\nx"):
        assert task.score(task.items[0], answer) == 1
    assert task.score(task.items[0], code.replace("2", "3")) == 0
    assert task.score(task.items[0], "") == 0


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl .*: expected humaneval/HumanEval or"):
        humaneval.load(TaskOptions(tmp_path))
    (tmp_path / "HumanEval.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="line 1: no 'task_id'"):
        humaneval.load(TaskOptions(tmp_path))
    (tmp_path / "mbpp.jsonl").write_text('{"task_id": 2}\n')
    with pytest.raises(ValueError, match="no row with task_id 3"):
        mbpp.load(TaskOptions(tmp_path))


def run_of_solutions(task, tokenizer, out, monkeypatch):
    """The report of a run whose model answers each prompt with the tokens of its solution."""
    loaded = dataclasses.replace(toys.loaded(), tokenizer=tokenizer)
    answers = {
        prompt.ids: ids_after(tokenizer, task.items[prompt.index].references[0])
        for prompt in encode(task, tokenizer, loaded.model.config, False)
    }

    def generate_each(model, params, prompts, policies, on_result, **settings):
        tokens = [answers[tuple(ids)] for ids in prompts]
        on_result(0, Generation(tokens, len(prompts), len(prompts)))

    monkeypatch.setattr(running, "generate_each", generate_each)
    return evaluate(loaded, task, Settings(), out, quiet=True)


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_solutions_pass_in_tokens_of_sentencepiece(folder, tmp_path, monkeypatch, scheme):
    settings = {"timeout": str(TIMEOUT), "max_new_tokens": "64"}
    task = humaneval.load(TaskOptions(folder, settings=settings))
    report = run_of_solutions(task, sentencepiece(scheme), tmp_path / "run", monkeypatch)
    assert report["policies"][0]["all"]["score"] == 1


@pytest.mark.data
def test_canonical_solutions_pass_in_tokens_of_sentencepiece(data_dir, tmp_path, monkeypatch):
    settings = {"timeout": str(TIMEOUT), "max_new_tokens": "64"}
    task = humaneval.load(TaskOptions(data_dir, limit=6, settings=settings))
    tokenizer = kvjax.load_tokenizer(data_dir / "checkpoints" / "stories260k")
    report = run_of_solutions(task, tokenizer, tmp_path / "run", monkeypatch)
    assert report["policies"][0]["all"]["score"] == 1


@pytest.mark.data
@pytest.mark.slow
def test_all_canonical_solutions(data_dir):
    task = humaneval.load(TaskOptions(data_dir))
    assert len(task.items) == 164
    solved = [humaneval_program(item, item.references[0]) for item in task.items]
    outcomes = run_many(solved, None, Limits(TIMEOUT))
    wrong = [(i.id, o.reason) for i, o in zip(task.items, outcomes, strict=True) if not o.passed]
    assert not wrong


@pytest.mark.data
@pytest.mark.slow
def test_no_empty_body_passes(data_dir):
    task = humaneval.load(TaskOptions(data_dir))
    empty = [humaneval_program(item, "    pass\n") for item in task.items]
    outcomes = run_many(empty, None, Limits(TIMEOUT))
    assert [i.id for i, o in zip(task.items, outcomes, strict=True) if o.passed] == []


@pytest.mark.data
@pytest.mark.slow
def test_some_mbpp_solutions(data_dir):
    task = mbpp.load(TaskOptions(data_dir))
    assert len(task.items) == 500
    items = [item for i, item in enumerate(task.items) if i % 20 == 0 or item.meta["setup"]]
    outcomes = run_many([mbpp_program(i, i.references[0]) for i in items], None, Limits(TIMEOUT))
    assert all(outcome.passed for outcome in outcomes)
