"""The wheel, built and installed into an empty folder: it has what package and command need.

Its dependencies are those of the tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvjax

ROOT = Path(__file__).parents[1]
WORKS = """
import kvjax
print(kvjax.__version__)
print(kvjax.__file__)
print(kvjax.load_tokenizer("builtin:needle").decode([4]))
print(kvjax.headkv.default_scores(kvjax.load("builtin:needle")[0].config).ranked[0])
"""
NOT_FOR_INFO = ("datasets", "grain", "matplotlib", "orbax", "torch", "transformers")
HEAVY = (*NOT_FOR_INFO, "flax", "optax", "scipy", "pydantic", "kvjax.nn")
LIGHT = f"""
import contextlib, io, sys
from kvjax.cli import main
said = io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    main(["--help"])
print("compress" in said.getvalue(), [name for name in {HEAVY!r} if name in sys.modules])
with contextlib.redirect_stdout(said):
    main(["info", "builtin:needle", "--compilation-cache", "off"])
print("GQA 8/4" in said.getvalue(), [name for name in {NOT_FOR_INFO!r} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel and nothing else."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="the test extra has hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    [file] = wheel.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    target = folder / "installed"
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", target, file], check=True)
    return target


def run(installed, *command):
    """The standard output of a command that finds the installed package, and not the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    found = subprocess.run(
        command, cwd=installed, env=environment, check=True, capture_output=True, text=True
    )
    return found.stdout


def test_what_the_wheel_ships(installed):
    assert {path.name for path in installed.iterdir()} == {
        "bin",
        "kvjax",
        f"kvjax-{kvjax.__version__}.dist-info",
        "pallas_kernels",
    }
    assert (installed / "kvjax" / "py.typed").is_file()


def test_the_package_works_from_the_wheel(installed):
    version, file, word, head = run(installed, sys.executable, "-c", WORKS).splitlines()
    assert version == kvjax.__version__
    assert Path(file).is_relative_to(installed)
    assert word and head == "(3, 0)"


def test_the_command_works_from_the_wheel(installed):
    said = run(installed, installed / "bin" / "kvjax", "--help")
    assert "compress" in said and "--compilation-cache" in said


def test_help_and_info_import_little(installed):
    """`kvjax --help` takes little more than `import jax`: it counts what is imported, not time."""
    help_, info = run(installed, sys.executable, "-c", LIGHT).splitlines()
    assert help_ == "True []"
    assert info == "True []"
