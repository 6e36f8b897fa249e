"""4-bit entries: what a row holds, how far its numbers move, and which implementation reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.hlo import copies
from kernels.oracle import on

import pallas_kernels
from pallas_kernels import Packed, dequantize, quantize
from pallas_kernels.entries import empty, row_bytes
from pallas_kernels.packed import groups, packed_bytes, unpack

# Numbers of a row, and its groups: how many, of how many numbers.
WIDTHS = {1: (1, 2), 8: (1, 8), 17: (1, 18), 32: (1, 32), 50: (2, 26), 64: (2, 32), 80: (3, 28)}


def rows(width, offset=0.0):
    """Rows of very different sizes, around `offset`."""
    rng = np.random.default_rng(width)
    sizes = np.exp(2 * rng.standard_normal((3, 40, 1)))
    return (sizes * rng.standard_normal((3, 40, width)) + offset).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_a_number_moves_by_at_most_half_a_step_of_its_group(width, offset):
    x, (count, size) = rows(width, offset), groups(width)
    assert (count, size) == WIDTHS[width]
    stored = quantize(jnp.asarray(x), jnp.int4)
    parts = np.pad(x, ((0, 0), (0, 0), (0, count * size - width)), mode="edge")
    parts = parts.reshape(3, 40, count, size)
    low, high = parts.min(axis=-1), parts.max(axis=-1)
    # The 16-bit range is wider than the numbers by the rounding of its ends: 2^-8 of them.
    step = ((high - low) + 2**-7 * np.maximum(abs(low), abs(high))) / 15 * (1 + 2**-7)
    moved = np.abs(np.asarray(unpack(stored)) - x)
    most = np.repeat(step, size, axis=-1)[..., :width] / 2
    assert (moved <= most * (1 + 1e-4)).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_these_bytes(width):
    count, size = WIDTHS[width]
    stored = quantize(jnp.asarray(rows(width)), jnp.int4)
    assert stored.shape == (3, 40, width) and stored.dtype == jnp.int4
    assert stored.values.dtype == jnp.uint8
    assert stored.values.shape[-1] == row_bytes(width, "int4") == count * (size // 2 + 4)
    assert jax.tree.map(jnp.shape, empty((2, width), "int4")) == Packed(
        (2, packed_bytes(width)), width
    )


def test_rows_that_are_exact():
    """16 levels or fewer with ends that 16 bits hold; a row of equal numbers; empty rows."""
    levels = np.arange(32, dtype=np.float32) % 16
    x = np.stack([levels, levels * 0.25 - 2, np.full(32, 0.5, np.float32)])
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(x), jnp.int4), jnp.float32), x)
    np.testing.assert_array_equal(
        dequantize(empty((2, 40), "int4"), jnp.float32), np.zeros((2, 40))
    )
    assert row_bytes(40, "int8") == 44 and row_bytes(40, "bfloat16") == 80


def test_a_dense_cache_is_not_unpacked_as_a_whole():
    B, N, K, S, H = 1, 4, 2, 1 << 14, 64
    cache = jax.eval_shape(lambda: empty((B, K, S, H), "int4"))
    q, lengths = jax.ShapeDtypeStruct((B, N, H), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    compiled = jax.jit(pallas_kernels.gqa_decode).lower(q, cache, cache, lengths).compile()
    assert not copies(compiled.as_text(), 4 * K * S)
    assert compiled.memory_analysis().temp_size_in_bytes < K * S * H // 2


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_rows_without_numbers(dtype):
    """Rotary keys of a latent layer without positions."""
    got = quantize(jnp.zeros((2, 3, 0)), jnp.dtype(dtype))
    assert got.shape == dequantize(got, jnp.float32).shape == (2, 3, 0)


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("NVIDIA H200", "gpu")])
def test_no_kernel_reads_them(kind, platform):
    """The library takes XLA by itself, and says so; the kernel by name is refused."""
    q, lengths = jnp.zeros((2, 4, 64), jnp.bfloat16), jnp.full((2, 2), 32)
    pool = empty((2, 64, 64), "int4")
    arrays = q, pool, pool, (0, 32), lengths
    with on(kind, platform):
        with pytest.raises(NotImplementedError, match="int4"):
            pallas_kernels.ragged_gqa_decode(*arrays, implementation=f"pallas_{platform}")
        table = jnp.zeros((3, 2, 2), jnp.int32)
        pools = {"k_pool": pool, "v_pool": pool, "implementation": f"pallas_{platform}"}
        with pytest.raises(NotImplementedError, match="int4"):
            pallas_kernels.schedule(table, table, queries_per_head=2, align=32, **pools)
        cache = empty((2, 2, 64, 64), "int4")
        with pytest.raises(NotImplementedError, match="int4"):
            pallas_kernels.gqa_decode(
                q, cache, cache, lengths[:, 0], implementation=f"pallas_{platform}"
            )
        pallas_kernels.api._WARNED.clear()
        with pytest.warns(RuntimeWarning, match="runs without its kernel.*int4"):
            jax.eval_shape(lambda x: pallas_kernels.ragged_gqa_decode(x, *arrays[1:]), q)
