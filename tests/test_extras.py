"""Packages that the base install lacks: nothing imports them early, and a missing one is a line."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvjax.extras import import_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"yaml": "pyyaml", "lm_eval": "lm-eval"}
"""Modules whose distribution has another name."""

BLOCKED = ("matplotlib", "grain", "pyarrow", "datasets", "lm_eval", "jieba", "tensorboardX")
START = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import eval.__main__, eval.command, eval.latency, eval.perplexity, eval.report.pictures, eval.suites
import kvjax.cli, train.__main__
"""


def distributions(extra):
    """The distributions that an extra installs by name, with those of its own extras."""
    found = set()
    for line in PROJECT["optional-dependencies"][extra]:
        name, _, rest = re.match(r"([\w-]+)(\[([\w,-]+)\])?", line).groups()
        inner = [distributions(each) for each in rest.split(",")] if name == "kvjax" else []
        found |= set().union(*inner) if inner else {name}
    return found


def calls():
    """(module, extra) of every call of `import_extra`."""
    files = [file for part in ("kvjax", "train", "eval") for file in (ROOT / part).rglob("*.py")]
    pattern = r'import_extra\("([\w.]+)", "([\w-]+)"\)'
    return sorted({call for file in files for call in re.findall(pattern, file.read_text())})


def test_extras_install_what_is_imported_from_them():
    assert {extra for _, extra in calls()} <= set(PROJECT["optional-dependencies"])
    for module, extra in calls():
        package = module.split(".")[0]
        assert DISTRIBUTIONS.get(package, package) in distributions(extra), (module, extra)
    assert distributions("train") | distributions("eval") <= distributions("test")


@pytest.mark.parametrize("module", ["matplotlib", "lm_eval.evaluator", "kvjax_nowhere"])
def test_a_missing_package_is_one_line(monkeypatch, module):
    if module != "kvjax_nowhere":
        monkeypatch.setitem(sys.modules, module, None)
    name = module.split(".")[0]
    line = rf"^the package {name} is not installed: pip install \"kvjax\[some\]\"$"
    with pytest.raises(ValueError, match=line):
        import_extra(module, "some")


def test_what_is_there_is_imported():
    assert import_extra("tomllib", "some") is tomllib


def test_programs_start_without_extras():
    subprocess.run([sys.executable, "-c", START], cwd=ROOT, check=True)


def test_commands_name_the_extra(monkeypatch, capsys, tmp_path):
    from eval.__main__ import main as evaluate
    from kvjax.cli import main as kvjax
    from train.__main__ import main as train

    for name in BLOCKED:
        monkeypatch.setitem(sys.modules, name, None)
    tune = ["finetune", "--model", "builtin:needle", "--data", "jsonl:x", "--out"]
    harness = ["lm-eval", "--model", "builtin:needle", "--tasks", "arc_easy"]
    for main, argv, package, extra in [
        (kvjax, ["demo", "--out"], "matplotlib", "plots"),
        (train, tune, "grain", "train"),
        (train, ["compare", "--out"], "matplotlib", "plots"),
        (evaluate, [*harness, "--out"], "lm_eval", "lm-eval"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([*argv, str(tmp_path / "out")])
        [line] = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert f"the package {package} is not installed: pip install" in line
        assert line.endswith(f'"kvjax[{extra}]"')
    assert not (tmp_path / "out").exists()
