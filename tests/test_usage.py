"""Arguments that are refused: a line for each problem and exit code 2, for every command line."""

import functools
import importlib
import shlex
import sys

import pytest

import eval.__main__
import train.__main__
from kvjax import cli, overview
from kvjax.policies import named

MAINS = {"kvjax": cli.main, "eval": eval.__main__.main, "train": train.__main__.main}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("kvjax", ["got no command, expected one of generate, chat, compress"]),
        ("kvjax nonsense", ["got 'nonsense', expected one of generate, chat"]),
        ("kvjax genrate m once", ["plan; the nearest is generate"]),
        ("kvjax info", ["got no MODEL, which is required; see `kvjax info --help`"]),
        ("kvjax score", ["got no MODEL, which is required", "got no OUT.json, which is required"]),
        ("kvjax score m out.json --policy x", ["got --policy,", "got x,"]),
        (
            "kvjax score m out.json --sample 3",
            ["the nearest option is --samples", "got 3"],
        ),
        (
            "kvjax convert m out --kv_rnk=3",
            ["got --kv_rnk=3, which this command does not take; the"],
        ),
        ("kvjax score m out.json --seed one", ["--seed is 'one', expected INT"]),
        ("kvjax convert m out --method best", ["--method is 'best', expected one of equal_cache"]),
        ("kvjax convert m out --kv-rank 0", ["kv_rank is 0, expected"]),
        ("kvjax generate m hello --seed", ["got --seed with too few values"]),
        ("kvjax plan m", ["got no --topology, which is required"]),
        ("eval needle --model m --polcy full", ["the nearest option is --policy", "got full"]),
        ("eval needle", ["got no --model, which is required"]),
        ("eval latency --model m --contexts", ["contexts"]),
        ("eval latency --model m --dtype int8", ["--dtype is 'int8', expected one of"]),
        ("eval report", ["got no runs, expected at least one folder"]),
        ("eval run", ["got no CONFIG, which is required"]),
        ("train", ["got no command, expected one of pretrain, export"]),
        ("train finetue --steps 3", ["family; the nearest is finetune"]),
        ("eval needl --model m", ["run; the nearest is needle"]),
        ("train finetune --step 3", ["got no --model", "the nearest option is --steps", "got 3"]),
        ("train pretrain", ["got no --config", "got no --out"]),
        ("train finetune --model m --steps many", ["--steps is 'many', expected"]),
        ("train finetune --config", ["got --config without a value, expected a YAML file"]),
        ("train compare --out x --workers 0", ["workers is 0, expected"]),
    ],
)
def test_each_problem_is_a_line(words, lines, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *argv = words.split()
    with pytest.raises(SystemExit) as stopped:
        MAINS[name](argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    found = said.err.splitlines()
    assert len(found) == len(lines), said.err
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(f"{name}: error: ") and start in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help_has_each_command_with_an_example(argv, capsys, monkeypatch):
    cli.main(argv)
    *lines, cache, _ = capsys.readouterr().out.splitlines()
    assert cache.startswith("--compilation-cache") and max(map(len, lines)) <= 80
    examples = [shlex.split(line) for line in lines if line.startswith("  ") and "  kvjax " in line]
    assert [words[1] for words in examples] == list(cli.COMMANDS)
    ran = []
    monkeypatch.setattr(cli, "local_arguments", lambda command: _recorded(command, ran))
    for words in examples:
        cli.main(words[1:])
    assert ran == list(cli.COMMANDS)


def _recorded(command, ran):
    @functools.wraps(command)
    def record(*args, **settings):
        ran.append(command.__name__)

    return record


def test_help_names_all_policies():
    names = [name for line in overview.POLICIES for name in line.split()]
    assert sorted(names) == sorted(named.MAKERS)


def test_help_stays_as_it_is(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", "--help"])
    assert not stopped.value.code
    assert "usage: kvjax score" in capsys.readouterr().out


def test_tyro_has_the_hook_that_it_calls_private():
    """Without it, `plain_usage_errors` lets tyro print its box: find the hook's new place."""
    assert callable(importlib.import_module("tyro._errors").on_parse_error)


def test_without_the_hook_tyro_says_it_in_its_own_way(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro._errors", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info"])
    assert "MODEL" in capsys.readouterr().err
