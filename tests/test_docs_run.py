"""The Python of pages and docstrings runs, on one tiny model."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import eval_toys
import numpy as np
import pytest

import kvjax

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(python|sh)\n(.*?)```", re.DOTALL)
MODULES = (kvjax, kvjax.policies, kvjax.headkv, kvjax.transmla, kvjax.tasks)


def blocks(page, language):
    """The blocks of a page, without those that a comment says not to run."""
    found = FENCE.findall(page.read_text())
    return [code for skip, kind, code in found if kind == language and not skip]


def public():
    """{dotted name: object} of everything that has a place on the API pages."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in MODULES
        for name in module.__all__
    }


def documented():
    """The examples in the docstrings of public functions and classes."""
    found = {}
    for name, value in public().items():
        doc = inspect.getdoc(value) if inspect.isfunction(value) or inspect.isclass(value) else None
        if doc and ">>>" in doc and value.__module__.startswith("kvjax"):
            found[name] = doc
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the examples take for granted: a model, its tokenizer, and a few texts."""
    path = eval_toys.checkpoint(tmp_path_factory.mktemp("docs") / "model")
    model, params = kvjax.load(path, dtype="float32")
    draw = np.random.default_rng(0).integers
    ids = draw(4, 200, (16, 32)).astype(np.int32)
    prompt = draw(4, 200, 40).tolist()
    return {
        "kvjax": kvjax,
        "np": np,
        "path": str(path),
        "model": model,
        "params": params,
        "tokenizer": kvjax.load_tokenizer(path),
        "prompts": [prompt],
        "tokens": np.asarray([prompt], np.int32),
        "lengths": np.asarray([40], np.int32),
        "ids": ids,
        "batches": np.split(ids, 2),
        "book_ids": prompt,
        "questions": [[5, 6, 7]],
        "task": [(prompt[:30], prompt[30:33])] * 2,
        "examples": [kvjax.Example(tuple(prompt), (7, 8))] * 2,
    }


@pytest.fixture
def place(tmp_path, monkeypatch, names):
    """A folder to write in, with the files that examples read; the names to run them with."""
    monkeypatch.chdir(tmp_path)
    kvjax.headkv.default_scores(names["model"].config).save("heads.json")
    return dict(names)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_of_a_page(page, place):
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), place)


@pytest.mark.parametrize("name", documented())
def test_example_of_a_docstring(name, place):
    example = doctest.DocTestParser().get_doctest(documented()[name], place, name, None, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def used(code):
    """The dotted names `a.b.c` of some Python."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute)}


def test_every_public_name_has_an_example():
    found = set()
    for page in PAGES:
        for code in blocks(page, "python"):
            found |= used(code)
    for doc in documented().values():
        for example in doctest.DocTestParser().get_examples(doc):
            found |= used(example.source)
    for file in (ROOT / "examples").glob("*.py"):
        found |= used(file.read_text())
    assert not public().keys() - found
