"""Imports point down the floors of CONTRIBUTING.md, and no two files import each other."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "kvjax", "train", "eval")


def floors(text):
    """{module: floor} from the table in CONTRIBUTING.md; the ground floor is 0."""
    section = text.split("## What goes where")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {
        name: floor for floor, row in enumerate(rows) for name in re.findall(r"`([\w.]+)`", row)
    }


def module_files(root, packages):
    """{module name: file} for all files of the packages."""
    found = {}
    for file in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def imported(name, file, modules):
    """The modules of the project that a file imports anywhere: at the top, inside functions, and
    under `if TYPE_CHECKING`."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name` names a module or something inside the package's own file.
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in modules else base for each in full}
    return found & set(modules) - {name}


def graph(root, packages):
    modules = module_files(root, packages)
    return {name: imported(name, file, modules) for name, file in modules.items()}


def room(module, floors):
    """The longest name of the table that the module is or is inside of. `kvjax` is only itself:
    its modules have places of their own."""
    parts = module.split(".")
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((p for p in prefixes if p in floors and (p != "kvjax" or module == p)), None)


def wrong_imports(imports, floors):
    """One line for each import that points up, or sideways into another room."""
    return [
        f"{name} imports {other}, which does not stand on a lower floor"
        for name, others in imports.items()
        for other in sorted(others)
        if room(name, floors) != room(other, floors)
        and floors[room(name, floors)] <= floors[room(other, floors)]
    ]


@pytest.fixture(scope="module")
def table():
    return floors((ROOT / "CONTRIBUTING.md").read_text())


@pytest.fixture(scope="module")
def imports():
    return graph(ROOT, PACKAGES)


def test_every_module_has_a_floor_and_every_name_is_a_module(imports, table):
    assert [name for name in imports if room(name, table) is None] == []
    assert [name for name in table if name not in imports] == []


def test_imports_point_down(imports, table):
    assert wrong_imports(imports, table) == []


def test_no_circles(imports):
    """`prepare` raises CycleError with the files of a circle."""
    graphlib.TopologicalSorter(imports).prepare()


def test_applications_are_imported_by_nothing(imports):
    for application in ("train", "eval"):
        inside = {name for name in imports if name.split(".")[0] == application}
        assert {name for name in imports if imports[name] & inside} <= inside


@pytest.mark.parametrize(
    "line",
    [
        "import kvjax.cli",
        "from kvjax import cli",
        "from .. import cli",
        "from ..cli import main",
        "def late():\n    from kvjax.cli import main",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kvjax.cli",
    ],
)
def test_an_import_that_points_up_is_found(tmp_path, line):
    below = tmp_path / "kvjax" / "nn"
    below.mkdir(parents=True)
    (below / "__init__.py").write_text("")
    (below / "layers.py").write_text(line)
    (tmp_path / "kvjax" / "__init__.py").write_text("")
    (tmp_path / "kvjax" / "cli.py").write_text("from kvjax.nn import layers")
    imports = graph(tmp_path, ["kvjax"])
    (problem,) = wrong_imports(imports, {"kvjax": 1, "kvjax.nn": 0, "kvjax.cli": 2})
    assert problem.startswith("kvjax.nn.layers imports kvjax.cli")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imports).prepare()
