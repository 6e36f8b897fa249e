"""A file that is replaced is the old one or the new one, on a full disk too."""

import re
from pathlib import Path

import numpy as np
import pytest
from full_disk import full_disk

from kvjax.checkpoint_files import NewTensor, write_file
from kvjax.extras import pyplot
from kvjax.headkv import HeadScores
from kvjax.paths import replacing
from kvjax.policies.need import NeedCurves
from kvjax.runs import write_json, write_picture

LIMIT = 2000


def tensors(path, seed, count):
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    write_file(path, [NewTensor("w", values.dtype, values.shape, lambda: values)])


def scores(path, seed, count):
    HeadScores(np.random.default_rng(seed).random((1, 1, count))).save(path)


def curves(path, seed, count):
    rises = np.random.default_rng(seed).random((1, count, 2))
    NeedCurves(np.asarray([0, 1]), rises, rises).save(path)


def settings(path, seed, count):
    write_json(path, {"numbers": np.random.default_rng(seed).random(count).tolist()})


def picture(path, seed, count):
    figure, axes = pyplot().subplots(figsize=(0.1 * count**0.5, 1))
    axes.plot(np.random.default_rng(seed).random(count))
    write_picture(path, figure, dpi=10 if count < 10 else 100)


@pytest.mark.parametrize("write", [tensors, scores, curves, settings, picture])
def test_a_full_disk_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "file.json"
    write(path, 0, 4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(LIMIT), pytest.raises(OSError):
        write(path, 1, 4000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(path, 1, 4000)
    assert path.stat().st_size > LIMIT
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


IN_PLACE = re.compile(
    r"\.write_text\(|\.write_bytes\(|savefig\((?!file)|shutil\.copy|np\.savez?\((?!file)"
    r"|open\([^)\n]*\"[wx]b?\""
)
THROUGH = {"kvjax/paths.py"}
"""The file with what writes."""
SANDBOX = ("linux", "mounts", "supervisor", "keeper", "judge", "worker")
PIPES = {f"eval/sandbox/{name}.py" for name in SANDBOX}
"""Files that write to the kernel, to pipes and into a file system in memory."""


def test_nothing_is_written_in_place():
    root, found = Path(__file__).parents[1], []
    files = [
        path for folder in ("kvjax", "train", "eval") for path in (root / folder).rglob("*.py")
    ]
    for path in sorted(files):
        name = str(path.relative_to(root))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if IN_PLACE.search(line) and name not in THROUGH | PIPES:
                found.append(f"{name}:{number}: {line.strip()}")
    # Folders of a tokenizer's templates are copied into a folder that is not complete yet.
    assert [line for line in found if "shutil.copytree" not in line] == []


def test_two_writers_at_a_time_have_parts_of_their_own(tmp_path):
    """As of two commands with the same --json FILE: the last one that ends has written it."""
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second, and longer")
            assert len(list(tmp_path.iterdir())) == 2
        assert path.read_bytes() == b"second, and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"first"


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path, others = tmp_path / "file", ("file.part", "file.0123abc.part", "files.0123abcd.part")
    for name in ("file.0123abcd.part", *others):
        (tmp_path / name).touch()
    with replacing(path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"file", *others}


def test_a_reader_sees_the_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"new"
