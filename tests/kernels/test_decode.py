"""The decode operations as XLA runs them, and what all implementations share."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import TOLERANCE, Options, check_gqa, check_mla, check_ragged

import pallas_kernels
from pallas_kernels import dequantize, quantize

# (lengths of the sequences, slots, query heads, KV heads, head dim)
CASES = {
    "equal": ((32, 32), 32, 8, 2, 16),
    "ragged": ((1, 17, 31, 32), 32, 8, 8, 64),
    "zero": ((0, 5), 16, 4, 1, 96),
    "group_of_8": ((100, 129), 130, 16, 2, 128),
    "wide_head": ((7,), 9, 2, 2, 256),
}
# Segments of the heads: starts, capacities; the pool may have gaps (alignment).
SEGMENTS = {
    "even": ((0, 16), (16, 16), 32),
    "skewed": ((0, 3, 4, 90), (3, 1, 86, 0), 96),
    "gaps": ((0, 16, 48), (9, 30, 5), 64),
}
EIGHT_BITS = ["int8", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_gqa_decode(case, softcap, window, dtype):
    check_gqa(*CASES[case], Options(dtype, None, window, softcap), "xla")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_ragged_gqa_decode(segments, softcap, dtype):
    starts, capacities, P = SEGMENTS[segments]
    check_ragged(
        starts, capacities, held(capacities), P, 2, 32, Options(dtype, None, None, softcap), "xla"
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_gqa_decode_with_segments_of_each_sequence(dtype):
    capacities = np.array([[40, 8, 24, 24], [3, 0, 80, 8], [24, 24, 24, 24]], np.int32)
    rounded = -(-capacities // 8) * 8
    starts = np.cumsum(rounded, axis=1, dtype=np.int32) - rounded
    lengths = (capacities * np.random.default_rng(3).random((3, 4))).astype(np.int32)
    lengths[0] = capacities[0]
    check_ragged(starts, capacities, lengths, 96, 2, 32, Options(dtype), "xla", align=8)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_gqa_decode_of_visible_rows(dtype):
    starts, capacities, P = SEGMENTS["gaps"]
    check_ragged(starts, capacities, held(capacities), P, 2, 32, Options(dtype), "xla", hidden=0.3)


@pytest.mark.parametrize("entries", [*EIGHT_BITS, "int4"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quantized_entries(dtype, entries):
    """All three operations; the scales of dead slots are NaN."""
    options = Options(dtype, entries, window=11)
    check_gqa((40, 7), 48, 8, 2, 32, options, "xla")
    check_ragged((0, 20), (20, 28), np.array([[20, 28], [3, 11]]), 48, 4, 32, options, "xla")
    check_mla((40, 7), 48, 8, 32, 16, options, "xla")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 2.0), (6, 2.0)])
@pytest.mark.parametrize(("N", "L", "R"), [(8, 32, 16), (16, 512, 64), (4, 24, 0)])
def test_mla_decode(N, L, R, window, softcap, dtype):
    check_mla((0, 1, 40), 48, N, L, R, Options(dtype, None, window, softcap), "xla")


def held(capacities):
    """Lengths of three sequences, the first one's full."""
    rng = np.random.default_rng(1)
    lengths = np.stack([rng.integers(0, c + 1, 3) for c in capacities], axis=1).astype(np.int32)
    lengths[0] = capacities
    return lengths


def test_quantization_rounds_to_the_nearest_step():
    x = jnp.asarray([[0.0, 0.0], [1.27, -0.634], [-300.0, 3.0]])
    got = quantize(x, jnp.int8)
    np.testing.assert_array_equal(got.values, [[0, 0], [127, -63], [-127, 1]])
    np.testing.assert_allclose(got.scale, [1.0, 0.01, 300 / 127], rtol=1e-6)
    np.testing.assert_allclose(dequantize(got, jnp.float32)[1], [1.27, -0.63], rtol=1e-6)


def test_arguments_are_checked():
    q, k = jnp.zeros((2, 6, 8)), jnp.zeros((2, 4, 16, 8))
    lengths = jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 KV heads"):
        pallas_kernels.gqa_decode(q, k, k, lengths)
    q = jnp.zeros((2, 8, 8))
    with pytest.raises(ValueError, match=r"lengths is \(3,\), expected \(2,\)"):
        pallas_kernels.gqa_decode(q, k, k, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"k is \(2, 4, 16, 9\), expected \(2, 4, 16, 8\)"):
        pallas_kernels.gqa_decode(q, jnp.zeros((2, 4, 16, 9)), k, lengths)
    with pytest.raises(ValueError, match="'cuda' is not one of auto, xla"):
        pallas_kernels.gqa_decode(q, k, k, lengths, implementation="cuda")
    pool = jnp.zeros((2, 10, 8))
    with pytest.raises(ValueError, match="segment 8:12 is outside of the pool's 10 rows"):
        pallas_kernels.ragged_gqa_decode(
            q, pool, pool, (0, 8), jnp.zeros((2, 2), jnp.int32), capacities=(8, 4)
        )
