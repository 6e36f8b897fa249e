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
