"""Runs of two processes: the items are shared, and the result is that of one process."""

import json

import eval_toys as toys
import pytest
import several

from eval.__main__ import main
from eval.predictions import PREDICTIONS, RESULTS

POLICIES = ("full", "snapkv:kv_size=16,observed=4")
TIMED = ("seconds", "computed", "date", "commit", "command", "device")


def words(model, out, *more):
    policies = [word for name in POLICIES for word in ("--policy", name)]
    grid = ["--lengths", 48, "--count", 4, "--set", "depths=2", "--batch-size", 2]
    settings = ["--dtype", "float32", "--out", out, *more]
    return [str(word) for word in ("needle", "--model", model, *policies, *grid, *settings)]


def result(out):
    report = json.loads((out / RESULTS).read_text())
    return {key: value for key, value in report.items() if key not in TIMED}


def lines(path):
    return path.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["generate", "teacher"])
def test_two_processes_give_the_result_of_one(tmp_path, protocol):
    model, more = toys.checkpoint(tmp_path / "model"), ("--protocol", protocol)
    one, two = tmp_path / "one", tmp_path / "two"
    main(words(model, one, *more))
    several.run(["eval", *words(model, two, *more)], two, variable=protocol == "teacher")
    assert result(one) == result(two)
    assert sorted(lines(one / PREDICTIONS)) == sorted(lines(two / PREDICTIONS))
    assert json.loads((two / RESULTS).read_text())["computed"] == 16
    assert {path.name for path in two.glob("predictions*")} == {PREDICTIONS}


def test_a_run_goes_on_with_fewer_processes(tmp_path):
    """As two processes leave it that were stopped, one of them while it put the files together."""
    model, whole, out = toys.checkpoint(tmp_path / "model"), tmp_path / "whole", tmp_path / "out"
    main(words(model, whole))
    out.mkdir()
    (out / "config.json").write_text((whole / "config.json").read_text())
    finished = lines(whole / PREDICTIONS)
    (out / PREDICTIONS).write_text("\n".join(finished[:5]) + "\n")
    (out / "predictions.1.jsonl").write_text("\n".join(finished[3:11]) + '\n{"id": "q')
    main(words(model, out))
    assert json.loads((out / RESULTS).read_text())["computed"] == 16 - 11
    assert result(out) == result(whole)
    assert sorted(lines(out / PREDICTIONS)) == sorted(finished)
    assert not (out / "predictions.1.jsonl").exists()
