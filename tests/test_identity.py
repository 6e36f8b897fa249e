"""A model's identity: every weight counts, and nothing else does."""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest

import kvjax
from kvjax.identity import checksum, identity

MODEL, PARAMS = meshes.toy(meshes.GQA, meshes.GQA)
MINE = identity(MODEL.config, PARAMS)


def changed_at(path, change):
    """The parameters with `change` made to the array at one path."""
    return jax.tree_util.tree_map_with_path(
        lambda here, leaf: change(leaf) if here == path else leaf, PARAMS
    )


@pytest.mark.parametrize("path", [path for path, _ in jax.tree.leaves_with_path(PARAMS)], ids=str)
def test_one_changed_number_is_seen_and_placed(path):
    last = changed_at(path, lambda leaf: leaf.at[(-1,) * leaf.ndim].add(1e-6))
    assert MINE.differences(identity(MODEL.config, last)) == f"other weights in {path[0].key}"


@pytest.mark.parametrize(
    "change", [lambda x: jnp.flip(x, 0), lambda x: -x, lambda x: 2 * x, lambda x: jnp.roll(x, 1)]
)
def test_changes_of_all_numbers_do_not_cancel(change):
    """Each flips as many bits of one kind as there are numbers: an even count."""
    path = jax.tree.leaves_with_path(PARAMS)[0][0]
    assert MINE.differences(identity(MODEL.config, changed_at(path, change)))


@pytest.mark.parametrize("shape", meshes.SHAPES)
def test_it_is_the_same_on_a_mesh(shape):
    assert identity(MODEL.config, meshes.spread(MODEL, PARAMS, shape)) == MINE


def test_it_is_the_same_wherever_the_model_lies(tmp_path):
    model, params = kvjax.load("builtin:needle", dtype="float32")
    kvjax.save(model, params, tmp_path / "copy")
    moved, copy = kvjax.load(tmp_path / "copy", dtype="float32")
    assert identity(moved.config, copy) == identity(model.config, params)


def test_what_else_differs_is_said():
    other = dataclasses.replace(MODEL.config, eos_ids=(3,))
    assert "configuration llama-" in MINE.differences(identity(other, PARAMS))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    found = MINE.differences(identity(MODEL.config, half))
    assert found == "dtype bfloat16, expected float32"
    noise = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    names = "embedding, final_norm, layers_0, layers_1 and 1 more"
    assert MINE.differences(identity(MODEL.config, noise)) == f"other weights in {names}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_a_checksum_of_known_value(dtype):
    """The sum, done again in Python's whole numbers: it must not change with jax or XLA."""
    x = jnp.asarray(np.linspace(-3, 3, 15).reshape(3, 5), jnp.float32).astype(dtype)
    bits = np.asarray(x).view(f"u{x.dtype.itemsize}").reshape(-1).tolist()
    total = 0
    for place, value in enumerate(bits):
        mixed = value ^ place * 0x9E3779B1 % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x7FEB352D % 2**32
        mixed = (mixed ^ mixed >> 15) * 0x846CA68B % 2**32
        total += mixed ^ mixed >> 16
    assert int(checksum(x)) == total % 2**32
