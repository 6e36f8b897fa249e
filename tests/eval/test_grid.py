"""Needle and reasoning grids; their teacher-forced scores are nearly those of
greedy decoding, and with the full cache exactly."""

import eval_toys as toys
import pytest

import kvjax
from eval.predictions import PREDICTIONS, read
from eval.run import LoadedModel, evaluate
from eval.task import TASKS, Settings, TaskOptions, load_task

POLICIES = ("snapkv:kv_size=16", "full", "streaming:kv_size=16")


@pytest.fixture(scope="module")
def builtin():
    model, params = kvjax.load("builtin:needle", dtype="float32")
    return LoadedModel("builtin:needle", model, params, kvjax.load_tokenizer("builtin:needle"))


def options(**changes):
    settings = {"depths": "3"} | changes.pop("settings", {})
    base = {"lengths": (96,), "count": 2, "tokenizer": toys.loaded().tokenizer}
    return TaskOptions(settings=settings, **base | changes)


@pytest.mark.parametrize("name", ["needle", "reasoning"])
def test_the_grid(name):
    task = load_task(name, options(lengths=(64, 96)))
    groups = [item.group for item in task.items]
    assert groups == [f"{n}/{d}" for n in (64, 96) for d in ("0.00", "0.50", "1.00") for _ in "ab"]
    assert len({item.id for item in task.items}) == len(groups)
    for item in task.items:
        assert len(item.prompt) == int(item.group.split("/")[0])
        assert toys.VOCAB.decode(item.meta["answer"]) == item.references[0]
        assert task.score(item, f" {item.references[0].upper()}. ") == 1.0
        assert task.score(item, item.references[0].split()[0]) == 0.0
    # A cell is the same whatever stands beside it.
    again = load_task(name, options(lengths=(96,), limit=1))
    assert [i.prompt for i in again.items] == [i.prompt for i in task.items[6::2]]
    other = load_task(name, options(seed=1))
    assert other.items[0].prompt != task.items[6].prompt


def test_depth_moves_the_fact():
    task = load_task("needle", options(settings={"depths": "2"}, count=1))
    first, last = (
        list(item.prompt).index(item.meta["answer"][0]) / len(item.prompt) for item in task.items
    )
    assert first < 0.2 and last > 0.6


def test_settings(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("the red fox runs . " * 40)
    recall = {"haystack": str(book), "metric": "rouge1_recall", "distractors": "2"}
    task = load_task("needle", options(settings=recall))
    item = task.items[0]
    first = item.references[0].split()[0]
    assert task.metric == "rouge1_recall" and task.score(item, f"it is {first}") == 0.25
    for wrong, message in (
        ({"depth": "3"}, "needle: unknown setting 'depth'"),
        ({"metric": "f1"}, "expected one of exact_match"),
        ({"depths": "many"}, "expected a whole number ≥ 1"),
        ({"haystack": "missing.txt"}, "no haystack file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task("needle", options(settings=wrong))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_task("needle", options(tokenizer=None))
    with pytest.raises(ValueError, match="no task 'needles'"):
        load_task("needles", options())
    assert list(TASKS)[:2] == ["needle", "reasoning"]


def test_emphasis_is_no_part_of_a_word():
    task = load_task("needle", options(count=1))
    item = task.items[0]
    for dress in ("{}", "**{}**", "__{}__", "_{}_."):
        assert task.score(item, dress.format(item.references[0])) == 1


def test_chat_models_get_text():
    task = load_task("needle", options(tokenizer=toys.loaded(chat=True).tokenizer))
    item = task.items[0]
    assert item.max_new_tokens == 64
    assert task.stops == ("\n",) and task.chat_stops == ()  # chats begin with line ends
    assert toys.VOCAB.encode(item.meta["text"]) == list(item.prompt[1:])


def test_teacher_forced_is_what_decoding_gives(tmp_path, builtin):
    task = load_task("needle", options(count=4))
    reports = {}
    for protocol in ("generate", "teacher", "after"):
        settings = Settings(POLICIES, protocol, batch_size=4)
        reports[protocol] = evaluate(builtin, task, settings, tmp_path / protocol, quiet=True)
    forced, decoded = (
        {(p.policy, p.id): p.score for p in read(tmp_path / name / PREDICTIONS)}
        for name in ("teacher", "generate")
    )
    # Under a policy only the first token can differ: decoding takes it from the prefill.
    other = {key for key in forced if forced[key] != decoded[key]}
    assert forced.keys() == decoded.keys() and len(other) < 0.1 * len(forced)
    assert {policy for policy, _ in other} <= {"snapkv:kv_size=16"}
    small, full, streaming = reports["teacher"]["policies"]
    assert full["all"]["score"] > streaming["all"]["score"]
    # Of the prompt alone: no padding of a bucket, no room.
    assert full["cache_bytes"] == full["full_cache_bytes"]
    assert full["gqa_cache_bytes"] == pytest.approx(full["cache_bytes"], rel=0.05)
    assert small["cache_bytes"] < 0.25 * full["cache_bytes"]
    assert reports["teacher"]["metric"] == "teacher_forced_exact_match"
    # Where nothing is lost it does not matter when the question is asked.
    assert reports["after"]["policies"][1]["all"] == full["all"]
    assert reports["after"]["policies"][0]["prompt_tokens"] == small["prompt_tokens"]
    again = evaluate(
        builtin, task, Settings(POLICIES, "teacher", batch_size=4), tmp_path / "teacher", quiet=True
    )
    assert again["computed"] == 0


def test_what_cannot_be_teacher_forced(tmp_path, builtin):
    task = load_task("needle", options())
    for policy in ("snapkv:kv_size=16,compression_interval=4", "full:entries=int8"):
        with pytest.raises(ValueError, match="cannot be teacher-forced"):
            evaluate(builtin, task, Settings((policy,), "teacher"), tmp_path / policy, quiet=True)
