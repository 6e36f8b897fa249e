"""The shell commands of README.md, CONTRIBUTING.md and docs/ are understood: words, names, files.

They need models and data of a user, so they are parsed, not run: every option exists, every value
has its type, every policy and setting has a name, every target and extra is there.
"""

import functools
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import eval.__main__
import eval.command
import eval.lm_eval
import eval.perplexity
import eval.report.command
import eval.suites
import train.__main__
from eval.task import TASKS
from kvjax import cli
from kvjax.policies.named import parse_policy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOOLS = ("kvjax", "python -m eval", "python -m train", "make", "pip install", "uv pip install")
SYNOPSIS = re.compile(r"\[|…")
"""What stands for other words."""
FOREIGN = {"NAME": "kvjax", "ZONE": "zone", "MODEL": "MODEL", "DATA": "data", "SCORES": "s.json"}
"""Variables of the shell, which docs/tpu_vm.md exports."""


def code(page):
    """The lines of blocks that are not in another language, and of indented ones."""
    text = page.read_text()
    blocks = [code for language, code in BLOCK.findall(text) if language in ("", "sh")]
    indented = re.findall(r"^    .*(?:\n|$)", BLOCK.sub("", text), re.MULTILINE)
    return "".join([*blocks, *indented]).replace("\\\n", " ").splitlines()


def lines():
    """The commands of all pages by tool, without comments, variables before them and `&`."""
    found = {tool: set() for tool in TOOLS}
    for line in (line.strip() for page in PAGES for line in code(page)):
        line = re.sub(r"\s+# .*$", "", line).removesuffix("&").strip()
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        tool = next((tool for tool in TOOLS if line.startswith(f"{tool} ")), None)
        bare = re.sub(r"\"[^\"]*\"|'\.\[", "", line)  # texts and extras are no synopsis
        if tool is not None and not SYNOPSIS.search(bare):
            found[tool].add(line)
    return {tool: sorted(each) for tool, each in found.items()}


LINES = lines()


def words(line, tool):
    for name, value in FOREIGN.items():
        line = line.replace(f"${name}", value)
    return shlex.split(line)[len(tool.split()) :]


def recorded(monkeypatch, *places):
    """Replaces functions, given by module and name, by ones that keep their arguments."""
    calls = []
    for module, name in places:

        @functools.wraps(getattr(module, name))
        def record(*args, **settings):
            calls.append(args)
            return ()

        monkeypatch.setattr(module, name, record)
    return calls


def recorders(commands):
    """Commands with the same parameters, and the list of those that were called."""
    calls = []

    def recorder(command):
        @functools.wraps(command)
        def record(*args, **settings):
            calls.append(command)

        return record

    return {name: recorder(command) for name, command in commands.items()}, calls


@pytest.mark.parametrize("line", LINES["kvjax"])
def test_kvjax(line, monkeypatch):
    commands, calls = recorders(cli.COMMANDS)
    monkeypatch.setattr(cli, "COMMANDS", commands)
    cli.main([*words(line, "kvjax"), "--compilation-cache", "off"])
    assert len(calls) == 1


RUNNERS = (
    *((eval.command, "run_command"), (eval.report.command, "write")),
    *((eval.perplexity, "run"), (eval.lm_eval, "run")),
    *((eval.suites, "run_command"), (eval.suites, "preview")),
)
"""What runs a command of eval that is parsed; each is looked up where it is called."""


@pytest.mark.parametrize("line", LINES["python -m eval"])
def test_eval(line, monkeypatch, tmp_path):
    name, *rest = words(line, "python -m eval")
    if name == "run":
        rest[0] = str(ROOT / rest[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    calls = recorded(monkeypatch, *RUNNERS)
    eval.__main__.main([name, *rest, "--compilation-cache", "off"])
    assert calls
    if name in TASKS:
        command = calls[0][1]
        eval.command.checked(name, command)
        assert command.out is not None or command.dry_run


@pytest.mark.parametrize("line", LINES["python -m train"])
def test_train(line, monkeypatch, tmp_path):
    name, *rest = words(line, "python -m train")
    config = [ROOT / word for word in rest if word.endswith(".yaml") and "/" in word]
    assert all(path.is_file() for path in config)
    commands, calls = recorders(train.__main__.COMMANDS)
    monkeypatch.setattr(train.__main__, "COMMANDS", commands)
    monkeypatch.setattr(train.__main__, "tune", commands["finetune"])
    train.__main__.main([name, *rest, "--compilation-cache", "off"])
    assert len(calls) == 1


@pytest.mark.parametrize("line", LINES["make"])
def test_make(line):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words(line, "make")) <= set(targets)


@pytest.mark.parametrize("line", LINES["pip install"] + LINES["uv pip install"])
def test_extras(line):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "-e ." in line or "-e '." in line
    for extras in re.findall(r"'\.\[(.*?)\]'", line):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


POLICY = re.compile(r"--policy '?([a-z]+(?::[^\s`'|\]]+)?)")


def test_policies_of_all_pages_have_names_and_settings():
    found = {text for page in PAGES for text in POLICY.findall(page.read_text())}
    known = {text for text in found if not SYNOPSIS.search(text)}
    assert len(known) > 8
    for text in known:
        parse_policy(re.sub(r",?(?:scores|need)=[^,]+", "", text))  # files of the user
