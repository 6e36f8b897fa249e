"""The examples run and show what they say; their core is short and takes public names only."""

import ast
import importlib
import runpy
from pathlib import Path

import eval_toys
import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CORES = {
    "ablate_heads": (),  # one line of its main
    "custom_policy": ("small_keys", "ends_first"),
    "own_loop": ("sample",),
    "compare_logits": ("divergences",),
    "long_document": ("answers",),
    "convert_and_export": ("convert",),
    "own_init": ("orthonormal",),
    "finetune": ("train",),
    "first_steps": ("last_layers",),
}
"""The functions of each example that a researcher would copy."""
NOTEBOOKS = {"first_steps"}
"""Scripts of cells, which may be long; no cell is. `make docs` runs them."""
PUBLIC = ("kvjax", "kvjax.chat", "kvjax.policies", "kvjax.config", "kvjax.scoring")
"""The modules that examples import from."""


def main(name, *args, **settings):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*args, **settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of two layers with the embedded model's words."""
    return str(eval_toys.checkpoint(tmp_path_factory.mktemp("tiny") / "model"))


def test_custom_policy(capsys):
    found = main("custom_policy")
    own, full = found["small keys, ends first"], found["full"]
    assert own.cache_bytes == found["snapkv"].cache_bytes < full.cache_bytes / 3
    assert own.tokens != full.tokens
    assert f"{own.cache_bytes:,} bytes" in capsys.readouterr().out


def test_own_loop(capsys):
    answer = main("own_loop")
    assert len(answer) == 4 and capsys.readouterr().out.strip()


def test_compare_logits():
    headkv, snapkv, streaming = main("compare_logits")
    assert len(headkv) == 6 and headkv.max() < 0.01
    assert headkv.mean() < snapkv.mean() < streaming.mean()


def test_long_document():
    assert main("long_document") == [" velvet", " copper"]


def test_ablate_heads():
    found = main("ablate_heads", 2, 128)
    assert list(found) == ["none", "the 4 highest", "the 4 lowest", "layer 0"]
    assert found["none"][0] == found["the 4 highest"][0] == 1.0


def test_convert_and_export(tiny):
    found = main("convert_and_export", tiny)
    assert found["converted"] != pytest.approx(found["original"], rel=1e-3)
    assert found["exported"] == pytest.approx(found["converted"], rel=1e-5)


def test_finetune(tiny):
    with jax.numpy_dtype_promotion("standard"):  # for optax
        losses = main("finetune", tiny, steps=20)
    assert len(losses) == 20 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


def test_own_init(capsys):
    assert main("own_init") < 1e-4
    assert "does not commute with RoPE" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_short_and_public(path):
    text = path.read_text()
    tree = ast.parse(text)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name in CORES[path.stem]:
        lines = ast.get_source_segment(text, functions[name]).splitlines()
        doc = ast.get_docstring(functions[name]).splitlines()
        assert sum(bool(line.strip()) for line in lines) - len(doc) <= 15, name
    cells = text.split("\n# %%") if path.stem in NOTEBOOKS else [text]
    longest = 14 if path.stem in NOTEBOOKS else 50
    assert max(len(cell.splitlines()) for cell in cells) <= longest
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kvjax"):
            assert node.module in PUBLIC
            module = importlib.import_module(node.module)
            public = getattr(module, "__all__", dir(module))
            assert {alias.name for alias in node.names} <= set(public)


def test_the_full_cache_does_not_differ_from_itself():
    toy = eval_toys.loaded()
    divergences = runpy.run_path(str(EXAMPLES / "compare_logits.py"))["divergences"]
    ids = np.random.default_rng(0).integers(4, 100, 40).tolist()
    assert not divergences(toy.model, toy.params, ids, 36, ["full"]).any()
