"""Needle and reasoning grids; their teacher-forced scores are nearly those of
greedy decoding, and with the full cache exactly."""

import dataclasses

import eval_toys as toys
import pytest
from tokenizer_toys import byte_level

import kvjax
from eval.predictions import PREDICTIONS, read
from eval.run import LoadedModel, evaluate
from eval.task import TASKS, Settings, TaskOptions, load_task
from kvjax.nn import Transformer

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


def test_inside_the_chat_template():
    task = load_task("needle", options(tokenizer=toys.loaded(chat=True).tokenizer, chat=True))
    for item in task.items:
        text = toys.VOCAB.decode(item.prompt)
        assert text.startswith("<bos> <unk> : ") and len(item.prompt) == 96  # "user" is no word
        # The assistant's turn begins with the beginning of the answer.
        assert text.endswith(" ? <eos> answer : answer :")
        asked = toys.VOCAB.decode(item.prompt[-item.meta["question_tokens"] :])
        assert asked.startswith("question : ") and asked.count("question") == 1
        assert item.max_new_tokens == 64
    assert task.chat_stops == ()
    with pytest.raises(ValueError, match="no chat template"):
        load_task("needle", options(chat=True))


def test_right_answers_are_fed_inside_the_template(tmp_path):
    loaded = toys.loaded(chat=True)
    task = load_task("needle", options(tokenizer=loaded.tokenizer, chat=True))
    reports = {}
    for protocol in ("generate", "teacher", "after"):
        settings = Settings(("full",), protocol, chat=True, max_length=toys.CONTEXT)
        if protocol == "generate":
            short = [dataclasses.replace(item, max_new_tokens=8) for item in task.items]
            task = dataclasses.replace(task, items=tuple(short))
        report = evaluate(loaded, task, settings, tmp_path / protocol, quiet=True)
        assert report["prompt"] == "chat"
        reports[protocol] = report["policies"][0]["all"]
    assert reports["teacher"] == reports["after"]
    raw = load_task("needle", options(tokenizer=loaded.tokenizer))
    with pytest.raises(ValueError, match="token ids outside the chat template, expected a task"):
        evaluate(loaded, raw, Settings(chat=True), tmp_path / "raw", quiet=True)
    with pytest.raises(ValueError, match="token ids inside the chat template"):
        evaluate(loaded, task, Settings(), tmp_path / "chat", quiet=True)


@pytest.fixture(scope="module")
def english():
    return byte_level()


def test_english_answers_are_judged_by_their_first_sentence(english):
    task = load_task("needle", options(tokenizer=english, lengths=(900,)))
    assert task.metric == "contains" and task.stops == ()
    item = task.items[0]
    [value] = item.references
    assert len(item.prompt) == 900 and item.meta["then_eos"] is False
    for right in (f" {value}.", f"\nIt is {value}.\nOr 7.", f" **{value}**, I think. Or 1.", value):
        assert task.score(item, right) == 1
    for wrong in ("", f"It is 7. Or {value}.", f"7\n{value}", f"{value}1", f"1{value}"):
        assert task.score(item, wrong) == 0
    exact = load_task(
        "needle", options(tokenizer=english, settings={"metric": "exact_match"}, lengths=(900,))
    )
    assert exact.score(item, f"{value}. It is.") == 1 and exact.score(item, f"is {value}.") == 0


def test_several_values_have_no_single_right_answer(english, tmp_path):
    several = {"values": "3", "distractors": "1", "value": "uuid"}
    task = load_task("needle", options(tokenizer=english, lengths=(2000,), settings=several))
    item = task.items[0]
    text = english.decode(item.prompt)
    assert len(set(item.references)) == 3 and text.count("One of the special magic uuids") == 6
    assert sorted(item.references, key=text.index) == list(item.references)
    assert task.score(item, " and ".join(item.references)) == 1
    assert task.score(item, item.references[1].upper()) == pytest.approx(1 / 3)
    long = Transformer(toys.config(max_position_embeddings=4096))
    loaded = dataclasses.replace(toys.loaded(), model=long, tokenizer=english)
    settings = Settings(protocol="teacher")
    with pytest.raises(ValueError, match="has 3 right answers, expected one"):
        evaluate(loaded, task, settings, tmp_path, quiet=True)


def test_texts_of_the_prompt(english):
    texts = {
        "instruction": "Read this.",
        "needle": "The code of {key} is {value}!",
        "question": "Which code has {key}?",
        "answer_prefix": "{key} has",
    }
    task = load_task("needle", options(tokenizer=english, lengths=(300,), settings=texts))
    for item in task.items:
        text, [value] = english.decode(item.prompt), item.references
        key = text.rpartition("Which code has ")[2].partition("?")[0]
        assert text.startswith("Read this.\n ")
        assert text.endswith(f"\nWhich code has {key}? {key} has")
        assert f" The code of {key} is {value}!" in text
    hop = {"age": "{key} counts {age} winters.", "question": "{a} or {b}?", "answer_prefix": ""}
    task = load_task("reasoning", options(tokenizer=english, lengths=(500,), settings=hop))
    text = english.decode(task.items[0].prompt)
    assert text.count(" winters.") == 2 and text.endswith("?")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("needle", {"needle": "It is {value}."}, r"without \{key\}, expected \{key\} and \{value"),
        ("needle", {"needle": "{key}: {value} {x}"}, r"with \{x\}, expected no placeholder but"),
        ("needle", {"question": "Which?"}, r"question is 'Which\?' without \{key\}"),
        ("needle", {"question": "Which {key?"}, "question is 'Which {key"),
        ("needle", {"age": "{key} {age}"}, "unknown setting 'age'"),
        ("needle", {"value": "date"}, "is 'date', expected word, number, uuid"),
        ("needle", {"value": "word", "answer_length": "3"}, "expected it for numbers"),
        ("needle", {"answer_length": "19"}, "numbers of 19 digits, expected 1 to 18"),
        ("needle", {"answer_length": "1", "distractors": "9"}, "10 different numbers of 1 digits"),
        ("reasoning", {"question": "Who, {a}?"}, r"without \{b\}"),
        ("reasoning", {"values": "2"}, "unknown setting 'values'"),
    ],
)
def test_wrong_texts_and_kinds(english, name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_task(name, options(tokenizer=english, lengths=(900,), settings=settings))


def test_the_embedded_language_has_one_value():
    with pytest.raises(ValueError, match="expected one query, one value of each key"):
        load_task("needle", options(settings={"values": "2"}))


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
