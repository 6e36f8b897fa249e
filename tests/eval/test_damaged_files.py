"""Files of runs that were damaged or edited: one line says where, what, and what was expected."""

import json
import re

import eval_toys as toys
import pytest
from file_kinds import PREDICTION as LINE

from eval.predictions import PREDICTIONS, read
from eval.report.command import ReportCommand, write
from eval.report.runs import find
from eval.run import evaluate
from eval.task import Settings


def part(score):
    return {"score": score, "standard_error": 0.05, "items": 8}


def entry(policy, kept):
    sizes = {"cache_bytes": 512.0, "full_cache_bytes": 4096.0, "gqa_cache_bytes": None}
    groups = {"x": part(0.25), "y": part(0.75)}
    return {"policy": policy, "all": part(0.5), "groups": groups, "kept": kept, **sizes}


def needle():
    about = {"task": "needle", "model": "m", "protocol": "generate", "items": 8, "metric": "em"}
    kept = {"256": [[9, 40], [20, 3]]}
    return about | {"policies": [entry("full", {}), entry("headkv:kv_size=24", kept)]}


def latency():
    row = {"policy": "full", "batch": 1, "time_to_first_token": 0.1, "time_per_token": None}
    rows = [{**row, "context": n, "cache_bytes": n * 100} for n in (256, 512)]
    return {"task": "latency", "model": "m", "rows": rows}


def folder(path, results):
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results))
    return path


def lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": 7}, "score is 7, expected a finite number from 0 to 1"),
        ({"score": -0.5}, "score is -0.5, expected a finite number from 0 to 1"),
        ({"score": float("nan")}, "score is nan, expected a finite number from 0 to 1"),
        ({"score": float("inf")}, "score is inf, expected"),
        ({"score": "0.5"}, "score is '0.5', expected"),
        ({"score": True}, "score is True, expected"),
        ({"score": 10**400}, "score is 1000"),
        ({"score": None}, "score is None, expected"),
        ({"id": 3}, "id is 3, expected a text that is not empty"),
        ({"id": ""}, "id is '', expected a text that is not empty"),
        ({"group": None}, "group is None, expected a text"),
        ({"policy": ["full"]}, "policy is ['full'], expected a text"),
        ({"prompt_tokens": 9.0}, "prompt_tokens is 9.0, expected a whole number"),
        ({"prompt_tokens": True}, "prompt_tokens is True, expected a whole number"),
        ({"prompt_tokens": "9"}, "prompt_tokens is '9', expected a whole number"),
        ({"cache_bytes": -512}, "cache_bytes is -512, expected a"),
        ({"full_cache_bytes": float("nan")}, "full_cache_bytes is nan, expected a"),
        ({"truncated": 0}, "truncated is 0, expected true or false"),
        ({"text": 5}, "text is 5, expected a text or null"),
        ({"note": "x"}, "note is unknown, expected only id, group"),
        ({"text": "x" * 999, "score": "y" * 999}, "score is 'yyyy"),
    ],
)
def test_a_value_that_is_none(tmp_path, change, said):
    path = lines(tmp_path / PREDICTIONS, {**LINE, "id": "q1"}, {**LINE, **change})
    with pytest.raises(ValueError, match=re.escape(f"{path}: line 2: {said}")) as error:
        read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(path))


def test_missing_fields_other_values_and_repetitions(tmp_path):
    lacking = {name: value for name, value in LINE.items() if name != "score"}
    path = lines(tmp_path / PREDICTIONS, lacking, [1], LINE, LINE, {**LINE, "id": 1, "score": 2})
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value) == (
        "\n".join(
            f"{path}: {line}; remove the line, and the run computes it again"
            for line in (
                "line 1: score is missing, expected a finite number from 0 to 1",
                "line 2 holds a list, expected an object",
                "line 4: policy 'full' and id 'q0' again, as in line 3",
                "line 5: id is 1, expected a text that is not empty",
                "line 5: score is 2, expected a finite number from 0 to 1",
            )
        )
    )


def test_lines_that_are_right_are_read(tmp_path):
    more = {**LINE, "policy": "snapkv", "text": None, "score": 1, "group": ""}
    found = read(lines(tmp_path / PREDICTIONS, LINE, more))
    assert [(p.policy, p.score, p.text) for p in found] == [
        ("full", 0.5, "an answer"),
        ("snapkv", 1, None),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "best"}, "policy is 'best', expected one of full"),
        ({"id": "q99"}, "id is 'q99', expected an item of the task"),
        ({"group": "other"}, "group is 'other', expected 'g0'"),
    ],
)
def test_predictions_of_another_run(tmp_path, change, said):
    task, settings = toys.task(2), Settings()
    evaluate(toys.loaded(), task, settings, tmp_path, quiet=True)
    path = tmp_path / PREDICTIONS
    held = [json.loads(line) for line in path.read_text().splitlines()]
    at = next(n for n, line in enumerate(held) if line["id"] == "q0")
    lines(path, *held[:at], {**held[at], **change}, *held[at + 1 :])
    with pytest.raises(ValueError, match=re.escape(f"line {at + 1}: {said}")):
        evaluate(toys.loaded(), task, settings, tmp_path, quiet=True)


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_a_score_that_is_none_is_not_written(tmp_path, value):
    task = toys.task(2, score=lambda item, text: value)
    with pytest.raises(ValueError, match=rf"item q\d under full: score is {value}, expected"):
        evaluate(toys.loaded(), task, Settings(), tmp_path, quiet=True)
    assert not read(tmp_path / PREDICTIONS)


def changed(change):
    results = needle()
    change(results, results["policies"][1])
    return results


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r, e: e["all"].update(score=7), "headkv:kv_size=24: all.score is 7, expected a"),
        (lambda r, e: e["all"].update(score=float("nan")), "all.score is nan"),
        (lambda r, e: e["all"].update(score="0.5"), "all.score is '0.5'"),
        (lambda r, e: e["all"].update(standard_error=-1), "all.standard_error is -1, expected a"),
        (lambda r, e: e["all"].pop("standard_error"), "all.standard_error is missing"),
        (lambda r, e: e["all"].update(items=2.5), "all.items is 2.5, expected a whole number"),
        (lambda r, e: e.update(all=0.5), "an entry's all is 0.5, expected an object"),
        (lambda r, e: e.update(policy=3), "an entry's policy is 3, expected a text"),
        (lambda r, e: e.update(cache_bytes="512"), "cache_bytes is '512', expected a"),
        (lambda r, e: e.update(cache_bytes=float("inf")), "cache_bytes is inf, expected a"),
        (lambda r, e: e.update(kept={"256": [[1.5]]}), "kept.256 is [[1.5]], expected [layers]"),
        (lambda r, e: e.update(kept={"many": [[1]]}), "kept.many is [[1]], expected"),
        (lambda r, e: e["groups"].update(x={"score": 2}), "groups.x.score is 2, expected"),
        (lambda r, e: e.update(summary={"strict": float("nan")}), "summary.strict is nan"),
        (lambda r, e: r.update(items=-1), "items is -1, expected a whole number"),
        (lambda r, e: r.update(command=5), "command is 5, expected a text"),
        (lambda r, e: r.update(versions="0.10"), "versions is '0.10', expected an object"),
    ],
)
def test_results_that_a_page_cannot_show(tmp_path, change, said):
    path = folder(tmp_path / "run", changed(change)) / "results.json"
    with pytest.raises(ValueError, match=re.escape(f"{path}: ") + ".*" + re.escape(said)):
        find([path.parent])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context": 0}, "row 2: context is 0, expected a whole number"),
        ({"batch": 1.5}, "row 2: batch is 1.5, expected a whole number"),
        ({"time_per_token": float("nan")}, "row 2: time_per_token is nan, expected a"),
        ({"cache_bytes": None}, "row 2: cache_bytes is None, expected a"),
    ],
)
def test_latencies_that_a_page_cannot_show(tmp_path, change, said):
    results = latency()
    results["rows"][1] |= change
    path = folder(tmp_path / "run", results)
    with pytest.raises(ValueError, match=re.escape(f"results.json: {said}")):
        find([path])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 2, "loss": NaN}', "line 2: loss is nan, expected a finite number"),
        ('{"step": 2, "loss": "1"}', "line 2: loss is '1', expected a finite number"),
        ('{"step": 1.5, "loss": 1}', "line 2: step is 1.5, expected a whole number"),
        ('{"step": 2, "loss": 1, "learning_rate": Infinity}', "line 2: learning_rate is inf"),
        ('{"step": 2, ', "line 2 is not JSON"),  # what follows would be left out
    ],
)
def test_training_logs_that_a_page_cannot_show(tmp_path, line, said):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 2.0}\n'
    path.write_text(f"{whole}{line}\n" + '{"step": 3, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}: {said}")):
        find([path])
    path.write_text(whole + '{"eval": 1}\n{"step": 2, "lo')
    assert [line["step"] for line in find([path])[0].log] == [1]


def test_layers_with_different_heads_have_no_picture_of_them(tmp_path):
    results = needle()
    results["policies"] = [entry("snapkv", {"256": [[1, 2], [3]]})]
    folder(tmp_path / "run", results)
    page = write(ReportCommand((tmp_path,), out=tmp_path / "out"))
    assert "Tokens kept" not in page.read_text()
