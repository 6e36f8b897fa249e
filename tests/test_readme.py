"""The README's Python runs as it stands, and its two commands exist."""

import re
from pathlib import Path

import eval_toys
from tokenizer_toys import CHAT, sentencepiece

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_first_python_block_runs(capsys, tmp_path):
    """On a tiny model with a chat template and a short page: SmolLM2 is not part of the package."""
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    path = eval_toys.checkpoint(tmp_path / "model")
    sentencepiece(chat_template=CHAT).save_pretrained(path)
    (tmp_path / "page.txt").write_text("the return x in " * 12 + "\n# another chapter")
    code = block[1].replace("builtin:smollm2", str(path))
    code = code.replace("kvjax/commands/demo/marrow_bay.txt", str(tmp_path / "page.txt"))
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    policies = re.findall(r'"([a-z]+[:\w=.,]*)"', re.search(r"for policy in \((.*)\)", code)[1])
    assert len(policies) == 4 and all(any(p in line for line in lines) for p in policies)


def test_the_output_below_it_is_that_of_its_policies():
    block, output = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL).groups()
    policies = re.findall(r'"([a-z]+[:\w=.,]*)"', re.search(r"for policy in \((.*)\)", block)[1])
    assert [line.split()[0] for line in output.splitlines()] == policies


def test_the_two_commands_come_first():
    first = re.search(r"```\n(.*?)```", README, re.DOTALL)
    assert [line.split()[:2] for line in first[1].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "lint", "bench"} <= set(targets)
