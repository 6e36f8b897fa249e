"""One of two processes, `python -m process_worker FOLDER`; test_processes.py starts them."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import conftest  # noqa: F401  strict numerics, checked shapes
import jax
import numpy as np
import pytest

import kvjax
from kvjax import processes
from kvjax.sharding import make_mesh


def writer_and_barriers():
    index = jax.process_index()
    assert (jax.process_count(), len(jax.devices()), len(jax.local_devices())) == (2, 4, 2)
    assert processes.several() and processes.is_writer() == (index == 0)
    assert processes.share(range(5)) == range(5)[index::2]
    called = []
    assert processes.on_writer(lambda: called.append(index) or {"from": index}) == {"from": 0}
    assert called == [0] * (index == 0)

    def refuse():
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        processes.on_writer(refuse)
    processes.barrier("here", 60.0)
    if index == 0:
        with pytest.raises(ValueError, match=r"waited 0.5 s at 'alone', expected all 2 processes"):
            processes.barrier("alone", 0.5)
    else:
        next(processes._numbers)
    processes.barrier("again", 60.0)


def load(path, mesh):
    """A model, and how many of its numbers this process asked its files for."""
    asked, place = [], jax.make_array_from_callback

    def counting(shape, sharding, read):
        def part(index):
            values = read(index)
            asked.append((shape, index, values.size))
            return values

        return place(shape, sharding, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", counting)
        model, params = kvjax.load(path, "float32", mesh)
    return model, params, sum(size for _, _, size in asked)


def same(params, other):
    def local(array):
        return [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards]

    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        assert x.sharding == y.sharding and not x.is_fully_addressable
        for (place, part), (also, expected) in zip(local(x), local(y), strict=True):
            assert place == also
            np.testing.assert_array_equal(part, expected)


def load_and_save(folder):
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    model, params, asked = load(folder / "gqa", mesh)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    assert asked <= matrices / 2 + 2 * (total - matrices)  # norms are on all devices
    for layout in ("hf", "native"):
        out = folder / layout
        kvjax.save(model, params, out, layout)
        same(params, kvjax.load(out, "float32", mesh)[1])
        with pytest.raises(ValueError, match="already holds a checkpoint"):
            kvjax.save(model, params, out, layout)
    with pytest.raises(ValueError, match="expected arrays on a mesh of all"):
        kvjax.save(model, kvjax.load(folder / "gqa", "float32")[1], folder / "none")
    with pytest.raises(ValueError, match="'deepseek_v3' needs one process"):
        kvjax.save(model, params, folder / "none", "deepseek_v3")
    assert not (folder / "none").exists()


def main():
    distributed, (folder,) = processes.take_flag(sys.argv[1:])
    processes.join(distributed)
    writer_and_barriers()
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # for orbax
        load_and_save(Path(folder))
    processes.barrier("all is well", 60.0)
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)  # as one that waits for data


if __name__ == "__main__":
    main()
