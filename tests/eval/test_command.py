"""`python -m eval`: dry runs, runs, latency, and errors of one line."""

import json

import eval_toys as toys
import pytest

from eval.__main__ import COMMANDS, main

POLICIES = ("full", "headkv:kv_size=12")
FLAGS = [x for name in POLICIES for x in ("--policy", name)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toys.checkpoint(tmp_path_factory.mktemp("command") / "model")


def run(*argv):
    main([str(a) for a in argv])


def needle(model, *rest):
    grid = ["--lengths", 48, 64, "--count", 2, "--set", "depths=2", "--dtype", "float32"]
    run("needle", "--model", model, *FLAGS, *grid, *rest)


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("eval: error: ")
    return errors


def test_a_dry_run_says_what_the_run_will_hold(model, tmp_path, capsys):
    needle(model, "--dry-run", "--json", tmp_path / "plan.json")
    assert "8 items, 2 shapes" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [row["bucket"] for row in plan["buckets"]] == [64, 48]
    assert [row["prompt_tokens"]["most"] for row in plan["buckets"]] == [64, 48]
    needle(model, "--out", tmp_path / "run", "--json", tmp_path / "report.json")
    printed = capsys.readouterr().out
    assert "exact_match" in printed and "64/1.00" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((tmp_path / "run" / "results.json").read_text())
    for row in report["policies"]:
        planned = [bucket["cache_bytes"][row["policy"]] for bucket in plan["buckets"]]
        assert row["cache_bytes"] == sum(planned) / 2
    assert report["command"].startswith("python -m eval needle --model")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["policies"] == list(POLICIES) and config["options"]["settings"] == {"depths": "2"}
    other = ["--lengths", 48, "--count", 1]
    errors = fails(capsys, "needle", "--model", model, *other, "--out", tmp_path / "run")
    assert "holds another run" in errors


def test_latency(model, tmp_path, capsys):
    sizes = ["--contexts", 40, "--batches", 2, "--new-tokens", 3, "--repeats", 2]
    settings = ["--dtype", "float32", "--out", tmp_path]
    run("latency", "--model", model, *FLAGS, *sizes, *settings)
    report = json.loads((tmp_path / "results.json").read_text())
    full, small = report["rows"]
    assert [full["policy"], small["policy"]] == list(POLICIES)
    for row in (full, small):
        assert row["context"] == 40 and row["batch"] == 2
        assert row["time_to_first_token"] > 0 and row["time_per_token"] > 0
        assert [len(times) for times in row["repeats"].values()] == [2, 2]
    assert small["cache_bytes"] < full["cache_bytes"] == full["full_cache_bytes"]
    errors = fails(capsys, "latency", "--model", model, "--contexts", 5000)
    assert "5032 tokens, expected at most" in errors
    assert "expected a whole number" in fails(capsys, "latency", "--model", model, "--repeats", 0)


def test_bad_input_is_one_line(model, tmp_path, capsys):
    start = ("needle", "--model", model)
    dry = (*start, "--dry-run", "--count", 1)
    short = (*dry, "--lengths", 48)  # a few prompts: making the default ones takes seconds
    for argv, message in (
        (("needles",), "got 'needles', expected one of needle, reasoning"),
        (start, "give --out"),
        ((*short, "--set", "depths"), "expected --set KEY=VALUE"),
        ((*short, "--set", "depths=x"), "expected a whole number"),
        ((*short, "--data-dir", tmp_path / "none"), "no folder at"),
        ((*short, "--policy", "best"), "not one of full"),
        ((*short, "--chat"), "no chat template"),
        # Refused before the prompts are made, which would take longer than any test.
        ((*start, "--out", "x", "--lengths", 10**9), "got prompts of 1000000000 tokens, expected"),
        (("ruler", *dry[1:], "--lengths", 10**9), "--lengths sets others"),
        (("needle", "--model", tmp_path / "none", "--dry-run"), "none"),
    ):
        assert message in fails(capsys, *argv)


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(name in printed for name in ("needle", "longbench", *COMMANDS))
    with pytest.raises(SystemExit):
        run()
