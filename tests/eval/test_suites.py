"""Every file of eval/configs says something that can be run; plans say what it takes."""

import json
import re
import shlex
from pathlib import Path

import eval_toys
import pytest

import kvjax
from eval.preview import parse_policies
from eval.suites import main, read
from kvjax.identity import identity

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "eval" / "configs").glob("*.yaml"))

TOY = """
title: Toy
model: builtin:needle
runs:
  - name: needle
    command: needle
    policies: [full, "snapkv:kv_size=12", "headkv:kv_size=12,scores={scores}/none.json"]
    options: {lengths: [96], count: 1, set: {depths: 2}}
  - name: speed
    command: latency
    policies: [full, "headkv_paper:kv_size=12,scores={scores}/none.json,beta=1.1"]
    options: {contexts: [64, 96], new_tokens: 4, repeats: 1}
  - name: lost
    command: longbench
    options: {subsets: [qasper]}
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return eval_toys.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_fit_the_commands(path):
    suite = read(path)
    for run in suite.runs:
        assert parse_policies(run.policies)
        assert len(set(run.policies)) == len(run.policies)
        command = run.build(Path("out"), Path("data"))
        assert command.model == run.model and command.out == Path("out") / run.name
        for policy in run.policies:
            assert "{" not in policy
        for text in getattr(command, "text", ()):
            assert text.startswith("hub:") or Path(text).is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_subsets_exist(path):
    from eval.tasks import babilong, longbench, loogle

    known = {
        "longbench": longbench.SUBSETS,
        "loogle": loogle.SUBSETS,
        "babilong": babilong.LABELS,
    }
    for run in read(path).runs:
        if run.command in known:
            assert set(run.options["subsets"]) <= set(known[run.command])


def test_there_is_a_file_for_each_table_and_figure():
    names = {path.stem for path in CONFIGS}
    assert {f"headkv_table{n}" for n in (1, 2, 3)} <= names
    assert {f"headkv_figure_{name}" for name in ("beta", "latency", "needle")} <= names
    assert {f"transmla_{name}" for name in ("finetuning", "perplexity", "zeroshot")} <= names
    assert "embedded" in names


def test_plan(toy, checkpoint, tmp_path, capsys):
    words = [str(toy), "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--dry-run"]
    main(words)
    said = capsys.readouterr().out
    assert "2 items" in said and "shapes: 1; prompts are read once for 3 policies" in said
    assert re.search(r"parameters: [\d.]+ M, [\d.]+ KiB in float32", said)
    assert said.count("full cache") == 1 + 2 + 1
    assert "8 measurements" in said
    assert "items unknown: LongBench's prompts" in said
    assert not (tmp_path / "out").exists()
    lines = [line[2:] for line in said.splitlines() if line.startswith("$ ")]
    assert shlex.split(lines[1])[:4] == ["python", "-m", "eval", "latency"]


def test_runs_end_up_in_folders_and_failures_in_one_line(toy, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    head, _, lost = TOY.partition("  - name: lost")
    first = head.partition("  - name: speed")[0]
    first = first.replace(', "headkv:kv_size=12,scores={scores}/none.json"', "")
    toy.write_text(f"{first}  - name: lost{lost}")
    with pytest.raises(ValueError, match="1 of 2 runs failed: lost"):
        main([str(toy), "--model", str(checkpoint), "--out", str(out), "--limit", "1"])
    assert "eval: error: lost: " in capsys.readouterr().err
    assert (out / "needle" / "results.json").is_file()


def test_results_of_another_command_are_not_taken_for_this_one(toy, checkpoint, tmp_path, capsys):
    head, speed, rest = TOY.partition("  - name: speed")
    toy.write_text(head.partition("  - name")[0] + speed + rest.partition("  - name: lost")[0])
    out = tmp_path / "out" / "speed"
    words = [str(toy), "--model", str(checkpoint), "--out", str(out.parent)]
    run = read(toy, model=str(checkpoint)).runs[0]
    out.mkdir(parents=True)
    command = shlex.join(["python", "-m", "eval", *run.argv(Path("elsewhere"))])
    model, params = kvjax.load(checkpoint)
    weights = identity(model.config, params).digest
    (out / "results.json").write_text(json.dumps({"command": command, "weights": weights}))
    main(words)
    assert "already exists" in capsys.readouterr().out
    (out / "results.json").write_text(json.dumps({"command": command, "weights": "0" * 12}))
    with pytest.raises(ValueError, match="1 of 1 runs failed: speed"):
        main(words)
    assert f"is of weights 000000000000, {checkpoint} has {weights} now" in capsys.readouterr().err
    toy.write_text(toy.read_text().replace("new_tokens: 4", "new_tokens: 5"))
    with pytest.raises(ValueError, match="1 of 1 runs failed: speed"):
        main(words)
    assert "is of another command (python -m eval latency" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        (
            ("command: latency", "command: speed"),
            "runs[1].command is 'speed', expected one of",
        ),
        (("name: speed", "name: needle"), "two runs named needle"),
        (("options: {lengths", "opts: {lengths"), "runs[0] has an unknown field 'opts'"),
        (("title: Toy", "title: [Toy"), "is not YAML"),
        (("title: Toy", "title: Toy\ntitle: Boy"), "'title' comes twice"),
        (("name: speed", "name: ../../speed"), "run 2: name is '../../speed', expected one of a f"),
        (("name: speed", "name: /tmp/speed"), "run 2: name is '/tmp/speed', expected one of a f"),
        (("model: builtin:needle", ""), "run 1 has no model"),
        (("title: Toy", "tables: Toy"), "got an unknown field 'tables'"),
    ],
)
def test_mistakes_are_named(toy, change, said):
    toy.write_text(TOY.replace(*change))
    with pytest.raises(ValueError, match=re.escape(said)):
        read(toy)


def test_options_that_a_command_lacks(toy):
    toy.write_text(TOY.replace("new_tokens: 4", "new_words: 4"))
    run = read(toy).runs[1]
    with pytest.raises(ValueError, match=r"speed: .*new_words, expected one of .*new_tokens"):
        run.build(None)


def test_unknown_policies_and_names(toy):
    with pytest.raises(ValueError, match="snapkw"):
        parse_policies(["snapkw:kv_size=9"])
    with pytest.raises(ValueError, match="no run nothing"):
        main([str(toy), "--only", "nothing", "--dry-run"])


@pytest.mark.parametrize(
    "option, said",
    [
        ("new_tokens: 2.5", "new_tokens is 2.5, expected a whole number"),
        ("new_tokens: many", "new_tokens is 'many', expected a whole number"),
        ("new_tokens: true", "new_tokens is True, expected a whole number"),
        ("contexts: [64, x]", "contexts is [64, 'x'], expected a whole number, or a list of these"),
        ("dtype: float8", "dtype is 'float8', expected one of float32, bfloat16, float16"),
        ("mesh: [a]", "mesh is ['a'], expected text, or null"),
    ],
)
def test_values_of_another_type(toy, option, said):
    toy.write_text(TOY.replace("contexts: [64, 96], new_tokens: 4, repeats: 1", option))
    with pytest.raises(ValueError, match=re.escape(f"{toy}, run 2, speed: latency: {said}")):
        read(toy).runs[1].build(None)


def test_values_that_the_command_line_takes_too(toy):
    toy.write_text(
        TOY.replace("contexts: [64, 96], new_tokens: 4", 'contexts: 64, new_tokens: "4"')
    )
    command = read(toy).runs[1].build(None)
    assert (command.contexts, command.new_tokens, command.repeats) == ((64,), 4, 1)
    toy.write_text(
        TOY.replace("command: latency", "command: perplexity").replace("contexts", "text")
    )
    with pytest.raises(ValueError, match="perplexity has no option new_tokens"):
        read(toy).runs[1].build(None)
