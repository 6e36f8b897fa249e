"""Runs through the compressed cache: what they say, and that interrupted ones are no different."""

import dataclasses
import json
import string

import eval_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import full_disk

import kvjax
from eval import results
from eval import run as running
from eval.predictions import PREDICTIONS, RESULTS, read
from eval.prompts import Shape, encode, make_batches, shapes
from eval.results import statistics
from eval.run import evaluate, resolve_all
from eval.task import Settings
from kvjax import generation, transmla
from kvjax.cache.storage import room_bucket
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores
from kvjax.prefilling import bucket_length
from kvjax.text import added_text

POLICIES = ("full", "snapkv:kv_size=12,observed=4")
SETTINGS = Settings(policies=POLICIES, batch_size=3)
TIMED = ("seconds", "computed", "date", "commit", "command")


def run(task, out, settings=SETTINGS, **rest):
    return evaluate(toys.loaded(), task, settings, out, quiet=True, **rest)


def timeless(report):
    return {key: value for key, value in report.items() if key not in TIMED}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, run(toys.task(), out)


def test_each_answer_is_what_generation_gives_for_the_prompt_alone(finished):
    out, _ = finished
    task, loaded = toys.task(), toys.loaded()
    lines = {(p.policy, p.id): p for p in read(out / PREDICTIONS)}
    assert len(lines) == 2 * len(task.items)
    for prompt in encode(task, loaded.tokenizer, loaded.model.config, False)[:3]:
        item = task.items[prompt.index]
        for policy in POLICIES:
            alone = kvjax.generate(
                loaded.model, loaded.params, [prompt.ids], item.max_new_tokens, policy
            )
            line = lines[policy, item.id]
            assert line.text == added_text(loaded.tokenizer, prompt.ids, alone.tokens[0])
            assert line.score == toys.checksum(item, line.text)
            assert (line.prompt_tokens, line.group) == (len(prompt.ids), item.group)
            held = (line.cache_bytes, line.full_cache_bytes)
            assert held == (alone.cache_bytes, alone.full_cache_bytes)


def test_what_the_result_says(finished):
    out, report = finished
    assert json.loads((out / RESULTS).read_text()) == report
    full, small = report["policies"]
    assert [row["policy"] for row in report["policies"]] == list(POLICIES)
    scores = [p.score for p in read(out / PREDICTIONS) if p.policy == POLICIES[1]]
    assert small["all"] == pytest.approx(statistics(scores))
    assert set(small["groups"]) == {"g0", "g1"}  # the twin has no group
    assert sum(part["items"] for part in small["groups"].values()) == len(scores) - 1
    assert full["cache_bytes"] == full["full_cache_bytes"] == full["gqa_cache_bytes"]
    room = room_bucket(6) * 256  # tokens to come, of 2 layers, 2 heads, keys and values, 8 floats
    held, uncompressed = (small[key] - room for key in ("cache_bytes", "full_cache_bytes"))
    assert 12 * 256 < held < 0.3 * uncompressed
    assert full["kept"] == {} and all(
        np.asarray(kept).sum() == 12 * 2 * 2 for kept in small["kept"].values()
    )
    assert report["computed"] == 2 * report["items"]
    assert {"device", "versions", "date", "command", "commit", "seed"} <= report.keys()


def test_the_standard_error():
    values = [0.0, 1.0, 1.0, 0.25]
    expected = np.sqrt(np.var(values, ddof=1) / 4)
    assert statistics(values) == {
        "score": 0.5625,
        "standard_error": pytest.approx(expected),
        "items": 4,
    }
    assert statistics([1.0])["standard_error"] is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_run_goes_on_to_the_same_files(tmp_path, temperature):
    """Stopped within a batch, with a torn line; nothing that is finished is scored again."""
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    whole = run(toys.task(), tmp_path / "whole", settings)
    judged = []

    def score(item, text):
        if len(judged) == 8:
            raise KeyboardInterrupt
        judged.append(item.id)
        return toys.checksum(item, text)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(toys.task(score=score), out, settings)
    before = (out / PREDICTIONS).read_text()
    assert before.count("\n") == 8
    with (out / PREDICTIONS).open("a") as file:
        file.write('{"id": "q')
    again = []

    def rest(item, text):
        again.append(item.id)
        return toys.checksum(item, text)

    report = run(toys.task(score=rest), out, settings)
    assert len(again) == report["computed"] == 2 * len(toys.task().items) - 8
    files = [(path / PREDICTIONS).read_text() for path in (tmp_path / "whole", out)]
    assert files[0] == files[1] and files[1].startswith(before)
    assert timeless(report) == timeless(whole)
    if temperature:
        texts = {p.id: p.text for p in read(out / PREDICTIONS) if p.policy == "full"}
        assert texts["twin"] != texts["q1"]  # samples of one prompt differ


def test_after_a_full_disk_the_same_call_finishes(finished, tmp_path):
    out = tmp_path / "run"
    with full_disk(300), pytest.raises(OSError, match="File too large"):
        run(toys.task(), out)
    assert not (out / RESULTS).exists()
    report = run(toys.task(), out)
    assert (out / PREDICTIONS).read_bytes() == (finished[0] / PREDICTIONS).read_bytes()
    assert timeless(report) == timeless(finished[1])


def test_nothing_is_left_to_do(finished):
    out, report = finished

    def never(item, text):
        raise AssertionError(item.id)

    again = run(toys.task(score=never), out)
    assert again["computed"] == 0 and timeless(again) == timeless(report)


def test_another_run_is_refused(finished):
    out, _ = finished
    other = dataclasses.replace(SETTINGS, seed=1)
    with pytest.raises(ValueError, match=r"holds another run \(seed 0, now 1\)"):
        run(toys.task(), out, other)
    with pytest.raises(ValueError, match=r"holds another run .*items_sha256"):
        run(toys.task(lengths=(33, 60)), out)


def test_a_run_on_other_weights_is_another_run(finished):
    """Fine-tuned projections change neither configuration nor final norm."""
    out, _ = finished
    loaded = toys.loaded()
    layer = loaded.params["layers_0"]
    attention = layer["attn"] | {"v": layer["attn"]["v"].at[0, 0, 0].add(1e-5)}
    tuned = loaded.params | {"layers_0": layer | {"attn": attention}}
    tuned = dataclasses.replace(loaded, params=tuned)
    with pytest.raises(ValueError, match=r"holds another run \(weights \w{12}, now \w{12}\)"):
        evaluate(tuned, toys.task(), SETTINGS, out, quiet=True)


def test_other_head_scores_are_another_run(tmp_path):
    """Under the name that they had: a score file, and the model's own."""
    heads, own = tmp_path / "heads.json", tmp_path / "model" / "head_scores.json"
    toys.SCORES.save(heads)
    own.parent.mkdir()
    toys.SCORES.save(own)
    config = dataclasses.replace(toys.loaded().model.config, source=str(own.parent))
    loaded = dataclasses.replace(toys.loaded(), model=Transformer(config))
    names = (f"headkv:kv_size=12,observed=4,scores={heads}", "headkv:kv_size=12,observed=4")
    settings, task = dataclasses.replace(SETTINGS, policies=names), toys.task(2)
    evaluate(loaded, task, settings, tmp_path / "run", quiet=True)
    other = HeadScores(toys.SCORES.samples[::-1])
    for path in (heads, own):
        other.save(path)
        with pytest.raises(ValueError, match=r"holds another run \(head_scores \{"):
            evaluate(loaded, task, settings, tmp_path / "run", quiet=True)
        toys.SCORES.save(path)
    again = evaluate(loaded, task, settings, tmp_path / "run", quiet=True)
    assert again["computed"] == 0


def test_what_judges_the_answers_is_part_of_the_run(finished):
    out, _ = finished
    task = toys.task()
    item = dataclasses.replace(task.items[0], meta={"test": "assert True"})
    for other in (
        dataclasses.replace(task, stops=(".",)),
        dataclasses.replace(task, items=(item, *task.items[1:])),
    ):
        with pytest.raises(ValueError, match=r"holds another run \(items_sha256"):
            run(other, out)


def test_a_damaged_line_is_named(tmp_path, finished):
    for name in ("config.json", PREDICTIONS):
        (tmp_path / name).write_text((finished[0] / name).read_text())
    lines = (tmp_path / PREDICTIONS).read_text().splitlines()
    (tmp_path / PREDICTIONS).write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"predictions.jsonl: line 2 is not JSON"):
        run(toys.task(), tmp_path)


def test_stops_and_a_summary(tmp_path):
    def summary(triples):
        return {"longest": max(len(text.split()) for _, text, _ in triples)}

    stops = tuple(f"{letter} " for letter in string.printable if letter != " ")
    report = run(toys.task(stops=stops, summary=summary), tmp_path)
    assert all(" " not in (p.text or "")[1:] for p in read(tmp_path / PREDICTIONS))
    assert report["policies"][0]["summary"] == {"longest": 1}


def mixed_task(**settings):
    """Items of one length: every second one stays raw, whatever is asked for."""
    items = tuple(
        dataclasses.replace(item, prompt=toys.VOCAB.decode(range(5 + n, 60 + n)), meta=meta)
        for n, item in enumerate(toys.task(6).items)
        for meta in [{"chat": False} if n % 2 else {}]
    )
    items = tuple(dataclasses.replace(item, max_new_tokens=6) for item in items)
    return dataclasses.replace(toys.task(6, **settings), items=items)


def test_each_form_has_stops_and_ends_of_its_own(tmp_path, monkeypatch):
    loaded, asked = toys.loaded(chat=True), []

    def generate_each(model, params, rows, policies, **settings):
        asked.append((rows, settings["eos_ids"]))
        return generation.generate_each(model, params, rows, policies, **settings)

    monkeypatch.setattr(running, "generate_each", generate_each)
    monkeypatch.setattr(running, "end_ids", lambda tokenizer, config, chat: (2, 3)[: 1 + chat])
    settings = Settings(chat=True, batch_size=3)
    for stops, chat_stops in (((" ",), ()), ((), (" ",))):
        out = tmp_path / str(len(stops))
        task = mixed_task(stops=stops, chat_stops=chat_stops)
        evaluate(loaded, task, settings, out, quiet=True)
        raw = {item.id for item in task.items if item.meta}
        for line in read(out / PREDICTIONS):
            assert (" " in (line.text or "")) == ((line.id in raw) != bool(stops))
    start = loaded.tokenizer.encode("<bos> user :", add_special_tokens=False)
    for rows, eos in asked:  # a batch has one form
        assert {row[: len(start)] == start for row in rows} == {eos == (2, 3)}
    assert {eos for _, eos in asked} == {(2,), (2, 3)}


def test_bytes_without_running_are_those_of_generation():
    loaded = toys.loaded()
    names = ("full:entries=int8", "h2o:kv_size=16", "knorm:ratio=0.25")
    policies = resolve_all(names, loaded.model)
    for policy in policies.values():
        shape, prompts = Shape(64, 5, 3), [[7] * 50, [8] * 64, [9] * 49]
        out = kvjax.generate(loaded.model, loaded.params, prompts, 5, policy)
        assert 3 * results.policy_bytes(loaded.model, jnp.float32, policy, shape) == out.cache_bytes
        full = results.uncompressed_bytes(loaded.model, jnp.float32, shape)
        assert 3 * full == out.full_cache_bytes


def test_bytes_of_the_gqa_model_that_was_converted(tmp_path):
    model, params = kvjax.load(toys.checkpoint(tmp_path / "m"), dtype="float32")
    batches = [np.random.default_rng(0).integers(4, 400, (4, 32))]
    with jax.numpy_dtype_promotion("standard"):
        stats = transmla.calibrate(model, params, batches)
    shape = Shape(64, 4, 1)
    expected = results.uncompressed_bytes(model, jnp.float32, shape)
    mla = transmla.convert(model, params, method="equal_cache")[0]
    sizes = {"stats": stats, "kv_rank": 8, "rope_dim": 8}
    closed = dataclasses.replace(transmla.BEST, refit=False)
    small = transmla.convert(model, params, method="decoupled", recipe=closed, **sizes)[0]
    for converted in (mla, small):
        assert results.gqa_bytes(converted, jnp.float32, shape) == expected
    assert results.uncompressed_bytes(small, jnp.float32, shape) < expected


def test_batches_have_one_shape_a_bucket():
    task, loaded = toys.task(lengths=(33, 64)), toys.loaded()
    prompts = encode(task, loaded.tokenizer, loaded.model.config, False)
    batches = make_batches(prompts, task.items, 3)
    assert sorted(p.index for b in batches for p in b.prompts) == list(range(len(task.items)))
    for batch in batches:
        assert len(batch.rows) == batch.shape.batch <= 3
        for prompt in batch.prompts:
            assert bucket_length(len(prompt.ids)) == batch.shape.bucket
            assert task.items[prompt.index].max_new_tokens == batch.shape.max_new_tokens
    keys = [(shape.bucket, shape.max_new_tokens) for shape in shapes(batches)]
    assert len(set(keys)) == len(keys) and keys == sorted(keys, reverse=True)


def test_tasks_and_settings_that_cannot_run(tmp_path):
    task = toys.task(2)
    twice = dataclasses.replace(task, items=(task.items[0], task.items[0]))
    with pytest.raises(ValueError, match="two items with id 'q0'"):
        run(twice, tmp_path)
    with pytest.raises(ValueError, match="has no items"):
        run(dataclasses.replace(task, items=()), tmp_path)
    for wrong, message in (
        ({"policies": ("full", "full")}, "each once"),
        ({"policies": ()}, "at least one"),
        ({"batch_size": 0}, "expected a whole number"),
        ({"protocol": "guess"}, "expected one of generate"),
        ({"protocol": "teacher", "temperature": 0.5}, "expected temperature 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**wrong)
    with pytest.raises(ValueError, match="after the raw prompt of task toy, expected no chat"):
        run(task, tmp_path, Settings(protocol="teacher", chat=True))
    with pytest.raises(ValueError, match="is not one of full"):
        run(task, tmp_path, Settings(policies=("best",)))
    assert not list(tmp_path.iterdir())
