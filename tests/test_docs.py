"""The documents name modules, files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("kvjax", "pallas_kernels", "train", "eval", "benchmarks")
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def defined(file):
    """Names that a file defines or imports, methods as Class.method too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def exists(dotted):
    """Whether `package.module.name` is a module or package, or a name inside of one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return count == len(parts) or parts[count] in defined(file)
    return ROOT.joinpath(*parts).is_dir()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_files_exist(document):
    text = document.read_text()
    dotted = set(re.findall(rf"(?<![\w./])((?:{'|'.join(CODE)})(?:\.[A-Za-z_]\w*)+)", text))
    files = {name for name in dotted if re.search(r"\.(json|jsonl|md|yaml|html|py)$", name)}
    assert [name for name in sorted(dotted - files) if not exists(name)] == []
    named = rf"(?<![\w./])((?:{'|'.join(CODE)}|tests|examples|docs)/[\w./*-]*\w\.\w+)"
    assert [name for name in re.findall(named, text) if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    """`make docs` checks the site; this holds for README.md too, and needs no mkdocs."""
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text())
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        if anchor and "/api/" not in str(target):
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w -]", "", title).strip().lower() for title in titles}
            assert anchor in {name.replace(" ", "-") for name in names}, f"{path}#{anchor}"


def test_the_tour_names_what_its_files_define():
    """Each `name` in a paragraph of a stop is defined in a file that the paragraph names."""
    stops = (ROOT / "docs" / "tour.md").read_text().split("## The floors")[0].split("\n## ")[1:]
    assert len(stops) == 5
    for stop in stops:
        files = re.findall(r"[a-z_]+/[\w/]+\.py", stop)
        names = set(re.findall(r"`([A-Za-z_][\w.]*)`", stop))
        assert files and names
        assert names - set().union(*(defined(ROOT / file) for file in files)) == set()
