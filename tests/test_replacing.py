"""A file that is replaced is the old one or the new one, on a full disk too."""

import contextlib
import resource

import numpy as np
import pytest

from kvjax.checkpoint_files import NewTensor, write_file
from kvjax.headkv import HeadScores
from kvjax.paths import replacing
from kvjax.policies.need import NeedCurves
from kvjax.runs import write_json

LIMIT = 2000


@contextlib.contextmanager
def full_disk():
    """No file grows beyond LIMIT bytes; the system then reports an error, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


@pytest.mark.parametrize("write", [tensors, scores, curves, settings])
def test_a_full_disk_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "file.json"
    write(path, 0, 4)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(), pytest.raises(OSError):
        write(path, 1, 4000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(path, 1, 4000)
    assert path.stat().st_size > LIMIT
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


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
