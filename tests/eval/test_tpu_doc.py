"""The commands of docs/tpu_vm.md: plans run, the others are understood, and the script has them."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import eval_toys
import pytest

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "tpu_vm.md").read_text()
SCRIPT = ROOT / "examples" / "tpu_vm.sh"


def commands():
    """Words of the document's `python -m eval` commands, variables as they stand."""
    blocks = re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    lines = "".join(blocks).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[3:] for words in split if words[:3] == ["python", "-m", "eval"]]


PLANS = [words for words in commands() if "--dry-run" in words]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the document's variables stand for here: a tiny model, two rows, its head scores."""
    folder = tmp_path_factory.mktemp("vm")
    model = eval_toys.checkpoint(folder / "model")
    data = folder / "data" / "longbench"
    data.mkdir(parents=True)
    names = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
    prompts = dict.fromkeys(names, "{context}\nquestion : {input}")
    (data / "dataset2prompt.json").write_text(json.dumps(prompts))
    (data / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(names, 8)))
    row = {"input": "who ?", "context": "the fox sees the barn . " * 9, "answers": ["the fox"]}
    for name in names:
        (data / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    scores = model / "head_scores.json"
    return {"MODEL": str(model), "DATA": str(data.parent), "SCORES": str(scores)}


def filled(words, places):
    return [re.sub(r"\$(\w+)", lambda found: places[found[1]], word) for word in words]


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_plans_run(number, places, capsys, monkeypatch):
    from eval.__main__ import main

    monkeypatch.chdir(ROOT)
    words = filled(PLANS[number], places)
    if words[0] == "run":
        words += ["--model", places["MODEL"]]
    main(words)
    said = capsys.readouterr().out
    assert "longbench" in said and "shapes" in said
    assert not os.path.exists(ROOT / "runs" / "qasper")


def test_a_plan_precedes_every_kind_of_run():
    assert len(PLANS) >= 3
    assert {words[0] for words in commands()} == {"longbench", "report", "run"}


def test_other_commands_are_understood(places):
    import tyro

    from eval.command import TaskCommand
    from eval.suites import read

    for words in commands():
        words = filled(words, places)
        if words[0] == "longbench":
            assert tyro.cli(TaskCommand, args=words[1:]).subsets == ("qasper",)
        elif words[0] == "run":
            names = [run.name for run in read(ROOT / words[1]).runs]
            assert words[words.index("--only") + 1] in names


def test_exports_name_all_variables():
    used = {name for words in commands() for word in words for name in re.findall(r"\$(\w+)", word)}
    assert used <= set(re.findall(r"(\w+)=\S+", "".join(re.findall(r"^export .*$", DOC, re.M))))


def test_the_script_has_the_commands_of_the_document(tmp_path):
    """With programs that only write down what they are told."""
    programs, log = tmp_path / "programs", tmp_path / "log"
    programs.mkdir()
    for name in ("uv", "python", "kvjax", "hf", "unzip", "git", "cp"):
        file = programs / name
        file.write_text(f'#!/bin/sh\nprintf "%s " {name} "$@" >> {log}\necho >> {log}\n')
        file.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    variables = {"MODEL": "org/name", "DATA": "data", "SCORES": "scores/heads.json"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", SCRIPT], cwd=tmp_path, env=path | variables, check=True, capture_output=True
    )
    blocks = "".join(re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL))
    for name, value in variables.items():
        blocks = blocks.replace(f"${name}", value)
    known = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    ran = [shlex.split(line) for line in log.read_text().splitlines()]
    shown = [words for words in ran if words[:2] not in (["hf", "auth"], ["python", "-c"])]
    assert [words for words in shown if words not in known] == []
    names = [words[0] for words in shown]
    assert names == ["uv", "hf", "unzip", "git", "cp", "kvjax", *["python"] * 4]
