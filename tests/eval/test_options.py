"""Options that would have no effect are refused, and settings without a meaning too."""

import dataclasses
import json
import math
from pathlib import Path

import eval_toys as toys
import pytest

from eval import latency, lm_eval, perplexity
from eval.command import TaskCommand, checked, dry_run
from eval.preview import preview
from eval.run import evaluate, form
from eval.suites import SuiteRun, read
from eval.task import TASKS, Settings, TaskOptions, check_form, load_task, reads_of
from eval.tasks import longbench

CONFIGS = sorted((Path(__file__).parents[2] / "eval" / "configs").glob("*.yaml"))
NAN, INF = math.nan, math.inf


def command(**changes):
    return TaskCommand("model", **changes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "gsm8k",
            {"count": 5},
            "does not read --count, expected only --data-dir, --limit, --shots",
        ),
        ("gsm8k", {"count": 20}, "does not read --count"),  # 20 would not be what is run
        ("gsm8k", {"lengths": (96,), "subsets": ("a",)}, "does not read --lengths, --subsets"),
        ("humaneval", {"shots": 3}, "does not read --shots"),
        ("longbench", {"lengths": (4096,)}, "does not read --lengths"),
        (
            "longbench",
            {"settings": ("metric=f1",)},
            "unknown setting 'metric', expected one of con",
        ),
        ("loogle", {"shots": 2}, "does not read --shots"),
        ("loogle", {"settings": ("depths=2",)}, "unknown setting 'depths', expected none"),
        ("babilong", {"count": 3}, "does not read --count"),
        ("longchat", {"subsets": ("a",)}, "does not read --subsets"),
        ("longchat", {"unsafe_execution": True}, "unknown setting 'unsafe_execution'"),
        ("needle", {"data_dir": Path(__file__).parent}, "does not read --data-dir"),
        ("reasoning", {"subsets": ("a",)}, "does not read --subsets"),
        ("ruler", {"count": 3}, r"does not read --count.*\(without --lengths it reads ready"),
        ("ruler", {"settings": ("haystack=x",)}, "unknown setting 'haystack', expected none"),
        (
            "gsm8k",
            {"shots": 8, "settings": ("prompt=ask",)},
            r"unknown setting 'prompt'.*--shots 0",
        ),
        ("gsm8k", {"seed": 3}, "--seed is 3, .* expected a temperature above 0"),
        ("ruler", {"seed": 3}, "--seed is 3"),
        ("humaneval", {"settings": ("samples=10",)}, "samples=10 at temperature 0"),
        ("needle", {"protocol": "teacher", "settings": ("metric=exact_match",)}, "--set metric"),
        ("gsm8k", {"protocol": "after", "settings": ("extraction=strict",)}, "--set extraction"),
        ("mbpp", {"protocol": "teacher", "settings": ("timeout=3",)}, "--set timeout"),
        ("needle", {"settings": ("depths=2", "depths=3")}, "--set depths twice"),
        ("needle", {"top_p": 0.9}, "top_p is 0.9 and top_k is 0 at temperature 0"),
        ("needle", {"protocol": "teacher", "top_k": 5}, "top_k is 5 at temperature 0"),
        ("needle", {"limit": 0}, "limit is 0, expected a whole number"),
        ("needle", {"limit": -2}, "limit is -2, expected a whole number"),
        ("needle", {"count": 0}, "count is 0, expected a whole number"),
        ("needle", {"seed": -1}, "seed is -1, expected a whole number"),
        ("needle", {"lengths": (-96,)}, r"lengths\[0\] is -96, expected a whole number"),
        ("needle", {"lengths": (96, 96)}, "lengths are 96, 96, expected each once"),
        ("needle", {"temperature": NAN}, "temperature is nan, expected a finite number"),
        ("needle", {"temperature": INF}, "temperature is inf, expected a finite number"),
        ("needle", {"temperature": -1.0}, "temperature is -1.0, expected a finite number"),
        ("needle", {"temperature": 1.0, "top_p": NAN}, "top_p is nan, expected a finite"),
        ("needle", {"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, expected a finite"),
        ("needle", {"temperature": 1.0, "top_k": -1}, "top_k is -1, expected a whole number"),
        ("needle", {"max_length": 0}, "max_length is 0, expected a whole number"),
        ("needle", {"batch_size": 0}, "batch_size is 0, expected a whole number"),
    ],
)
def test_what_would_have_no_effect_or_meaning(name, options, message):
    with pytest.raises(ValueError, match=message):
        checked(name, command(**options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("needle", {"count": 5, "lengths": (96,), "seed": 3, "limit": 2}),
        ("needle", {"protocol": "teacher", "settings": ("depths=2", "distractors=5")}),
        ("ruler", {"lengths": (4096,), "count": 2, "settings": ("haystack=x",), "seed": 1}),
        ("ruler", {"subsets": ("vt",), "limit": 3}),
        ("gsm8k", {"shots": 8, "settings": ("extraction=flexible", "max_new_tokens=99")}),
        ("gsm8k", {"shots": 0, "settings": ("prompt=ask",), "chat": True}),
        ("gsm8k", {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3}),
        ("humaneval", {"temperature": 0.5, "settings": ("samples=10", "timeout=3")}),
        ("mbpp", {"shots": 0, "unsafe_execution": True}),
        ("babilong", {"lengths": (0, 1024), "subsets": ("qa1",)}),
        ("longbench", {"max_length": 8078, "truncate": "left", "max_new_tokens": 64}),
    ],
)
def test_what_a_task_reads_is_taken(name, options):
    settings, read = checked(name, command(**options))
    assert settings.seed == options.get("seed", 0)
    assert set(options) & {f.name for f in dataclasses.fields(TaskOptions)} - {
        "settings",
        "seed",
        "chat",
    } <= set(read)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_reads(name):
    found, fields = reads_of(name, TaskOptions()), {f.name for f in dataclasses.fields(TaskOptions)}
    assert {"limit"} <= set(found.options) <= fields and set(found.scoring) <= set(found.settings)
    with pytest.raises(ValueError, match="unknown setting 'nonsense'"):
        load_task(name, TaskOptions(settings={"nonsense": "1"}))


@pytest.fixture
def folder(tmp_path):
    row = {"question": "2 + 2?", "answer": "#### 4"}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    place = tmp_path / "longbench"
    place.mkdir()
    for file, value in (("dataset2prompt", "{context}{input}"), ("dataset2maxlen", 9)):
        (place / f"{file}.json").write_text(json.dumps(dict.fromkeys(longbench.SUBSETS, value)))
    row = {"input": "Q", "context": "C", "answers": ["x"], "all_classes": ["x"]}
    for name in ("qasper", "trec"):
        (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "ruler").mkdir()
    ready = {"input": "It is", "outputs": ["x"]}
    (tmp_path / "ruler" / "vt.jsonl").write_text(json.dumps(ready) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsm8k", {}, "task gsm8k: MetaMath has raw text, expected --set prompt=ask$"),
        ("gsm8k", {"shots": 1}, "expected --set prompt=ask without --shots"),
        ("longbench", {"subsets": ("trec",)}, "expected another --subsets"),
        ("ruler", {}, "expected no --chat"),
    ],
)
def test_a_chat_template_around_nothing(folder, tmp_path, name, options, message):
    task = load_task(name, TaskOptions(data_dir=folder, **options))
    loaded = toys.loaded(chat=True)
    with pytest.raises(ValueError, match=message):
        evaluate(loaded, task, Settings(chat=True), tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match=message):
        dry_run(loaded.model, loaded.tokenizer, task, Settings(chat=True), "float32")
    assert not (tmp_path / "out").exists()
    check_form(task, Settings())


def test_results_say_which_prompts_stay_raw(folder):
    from eval.prompts import encode

    loaded, short = toys.loaded(chat=True), {"prompt": "ask", "max_new_tokens": "9"}
    task = load_task("longbench", TaskOptions(data_dir=folder))
    check_form(task, Settings(chat=True))
    for chat, said in ((False, "raw"), (True, "chat, but raw: trec")):
        assert form(encode(task, loaded.tokenizer, loaded.model.config, chat), task) == said
    asked = load_task("gsm8k", TaskOptions(data_dir=folder, settings=short))
    assert form(encode(asked, loaded.tokenizer, loaded.model.config, True), asked) == "chat"


def test_more_examples_than_there_are(folder):
    with pytest.raises(ValueError, match="got 8 shots, expected ≤ 1"):
        load_task("gsm8k", TaskOptions(data_dir=folder, shots=8))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_suites_ask_for_nothing_without_effect(path, tmp_path):
    others = {"latency": latency, "perplexity": perplexity, "lm-eval": lm_eval}
    for run in read(path).runs:
        found = run.build(Path("out"), tmp_path)
        if run.command in others:
            others[run.command].check(found)
        else:
            checked(run.command, found)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("needle", {"lengths": [96], "shots": 2}, "does not read --shots"),
        ("needle", {"lengths": [96], "temperature": NAN}, "temperature is nan"),
        ("perplexity", {"text": ["a.txt"], "stride": 0}, "stride is 0, expected a whole number"),
        ("perplexity", {"text": ["a.txt"], "limit": -1}, "limit is -1, expected a whole number"),
        ("perplexity", {"text": ["a.txt"], "length": 1}, "length is 1, expected a whole number"),
        ("latency", {"contexts": [64, 0]}, r"contexts are \(64, 0\), expected"),
        ("latency", {"seed": -1}, "seed is -1, expected a whole number"),
        ("lm-eval", {"tasks": ["x"], "limit": 0}, "limit is 0, expected a whole number"),
        (
            "lm-eval",
            {"tasks": ["x"], "num_fewshot": -1},
            "num_fewshot is -1, expected a whole",
        ),
        ("lm-eval", {"tasks": ["x"], "max_length": 0}, "max_length is 0, expected a whole number"),
    ],
)
def test_a_plan_refuses_what_the_command_would(name, options, message):
    run = SuiteRun("r", name, "no model", ("full",), options)
    with pytest.raises(ValueError, match=message):
        list(preview(run.command, run.build(None)))


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_a_switch_is_on_or_off(value):
    from eval.tasks.code import judge

    with pytest.raises(ValueError, match=f"unsafe={value}, expected 1 or 0"):
        judge(lambda item, answer: "", TaskOptions(settings={"unsafe": value}))
