"""The environments of other libraries: pinned, made once, made again when the pins change."""

import subprocess
import venv

import pytest

from benchmarks.peers import __main__ as peers


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Counts the environments that are made, and makes none."""
    calls = []
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: folder.mkdir(exist_ok=True))
    monkeypatch.setattr(subprocess, "run", lambda call, check: calls.append(call))
    return calls


def test_environment_is_made_once_for_the_same_pins(made, tmp_path):
    folder = tmp_path / "venv"
    python = peers.environment_of("kvpress", folder)
    assert python == folder / "bin" / "python"
    peers.environment_of("kvpress", folder)
    assert len(made) == 1
    (folder / "requirements-kvpress.txt").write_text("kvpress==0\n")
    peers.environment_of("kvpress", folder)
    assert len(made) == 2


@pytest.mark.parametrize("library", list(peers.SCRIPTS))
def test_every_version_is_pinned(library):
    lines = (peers.HERE / f"requirements-{library}.txt").read_text().splitlines()
    needs = [line for line in lines if line and not line.startswith("#")]
    assert needs and all("==" in line for line in needs)
    assert (peers.HERE / peers.SCRIPTS[library]).is_file()
