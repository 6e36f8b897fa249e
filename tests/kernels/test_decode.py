"""Decode operations against a plain numpy oracle, one list of cases for every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Quantized, dequantize, quantize

IMPLEMENTATIONS = ["xla"]
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}

# (lengths of the sequences, slots, query heads, KV heads, head dim)
CASES = {
    "equal": ((32, 32), 32, 8, 2, 16),
    "ragged": ((1, 17, 31, 32), 32, 8, 8, 64),
    "zero": ((0, 5), 16, 4, 1, 96),
    "group_of_8": ((100, 129), 130, 16, 2, 128),
    "wide_head": ((7,), 9, 2, 2, 256),
}


def attend(q, k, v, scale, softcap=None):
    """Softmax attention of one query over k [n, H], v [n, Hv], in float64; zeros without keys."""
    if not len(k):
        return np.zeros(v.shape[-1]), -1e30
    logits = k @ q * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max()
    weights = np.exp(logits - top)
    return weights @ v / weights.sum(), top + np.log(weights.sum())


def random(rng, shape, dtype):
    """A jax array, and the float64 numpy array of exactly its values."""
    array = jnp.asarray(rng.standard_normal(shape), jnp.dtype(dtype))
    return array, np.asarray(array.astype(jnp.float32), np.float64)


def check(got, expected, dtype):
    got = np.asarray(got.astype(jnp.float32))
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_gqa_decode(case, softcap, window, dtype, implementation):
    lengths, S, N, K, H = CASES[case]
    rng, B = np.random.default_rng(0), len(lengths)
    q, q64 = random(rng, (B, N, H), dtype)
    k, k64 = random(rng, (B, K, S, H), dtype)
    v, v64 = random(rng, (B, K, S, H), dtype)
    dead = np.arange(S)[None] >= np.asarray(lengths)[:, None]
    if window is not None:
        dead |= np.arange(S)[None] < np.asarray(lengths)[:, None] - window
    poison = jnp.asarray(dead)[:, None, :, None]
    out, lse = pallas_kernels.gqa_decode(
        q,
        jnp.where(poison, jnp.nan, k),
        jnp.where(poison, jnp.nan, v),
        jnp.asarray(lengths, jnp.int32),
        window=window,
        softcap=softcap,
        implementation=implementation,
        return_lse=True,
    )
    assert out.dtype == q.dtype and out.shape == (B, N, H)
    expected = [
        [
            attend(
                q64[b, n],
                k64[b, n // (N // K), ~dead[b]],
                v64[b, n // (N // K), ~dead[b]],
                H**-0.5,
                softcap,
            )
            for n in range(N)
        ]
        for b in range(B)
    ]
    check(out, np.array([[o for o, _ in row] for row in expected]), dtype)
    got_lse, want_lse = np.asarray(lse), np.array([[x for _, x in row] for row in expected])
    np.testing.assert_allclose(got_lse, want_lse, rtol=2e-2 if dtype == "bfloat16" else 1e-5)


# Segments of the heads: starts, capacities; the pool may have gaps (alignment).
SEGMENTS = {
    "even": ((0, 16), (16, 16), 32),
    "skewed": ((0, 3, 4, 90), (3, 1, 86, 0), 96),
    "gaps": ((0, 16, 48), (9, 30, 5), 64),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_ragged_gqa_decode(segments, softcap, dtype, implementation):
    starts, capacities, P = SEGMENTS[segments]
    rng, B, G, H, K = np.random.default_rng(1), 3, 2, 32, len(starts)
    lengths = np.stack([rng.integers(0, c + 1, B) for c in capacities], axis=1).astype(np.int32)
    lengths[0] = capacities
    q, q64 = random(rng, (B, K * G, H), dtype)
    k, k64 = random(rng, (B, P, H), dtype)
    v, v64 = random(rng, (B, P, H), dtype)
    rows = np.arange(P)
    live = np.zeros((B, P), bool)
    for head in range(K):
        live |= (rows >= starts[head]) & (rows < starts[head] + lengths[:, head, None])
    poison = jnp.asarray(~live)[..., None]
    out = pallas_kernels.ragged_gqa_decode(
        q,
        jnp.where(poison, jnp.nan, k),
        jnp.where(poison, jnp.nan, v),
        starts,
        jnp.asarray(lengths),
        capacities=capacities,
        scale=0.2,
        softcap=softcap,
        implementation=implementation,
    )
    expected = np.zeros((B, K * G, H))
    for b in range(B):
        for n in range(K * G):
            segment = slice(starts[n // G], starts[n // G] + lengths[b, n // G])
            expected[b, n] = attend(q64[b, n], k64[b, segment], v64[b, segment], 0.2, softcap)[0]
    check(out, expected, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_gqa_decode_with_segments_of_each_sequence(dtype, implementation):
    rng, B, K, G, H, P = np.random.default_rng(3), 3, 4, 2, 32, 96
    capacities = np.array([[40, 8, 24, 24], [3, 0, 80, 8], [24, 24, 24, 24]], np.int32)
    rounded = -(-capacities // 8) * 8
    starts = np.cumsum(rounded, axis=1) - rounded
    lengths = (capacities * rng.random((B, K))).astype(np.int32)
    lengths[0] = capacities[0]
    q, q64 = random(rng, (B, K * G, H), dtype)
    k, k64 = random(rng, (B, P, H), dtype)
    v, v64 = random(rng, (B, P, H), dtype)
    live = np.zeros((B, P), bool)
    for b in range(B):
        for start, length in zip(starts[b], lengths[b], strict=True):
            live[b, start : start + length] = True
    poison = jnp.asarray(~live)[..., None]
    out = pallas_kernels.ragged_gqa_decode(
        q,
        jnp.where(poison, jnp.nan, k),
        jnp.where(poison, jnp.nan, v),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(lengths),
        capacities=jnp.asarray(capacities),
        align=8,
        scale=0.2,
        implementation=implementation,
    )
    expected = np.zeros((B, K * G, H))
    for b in range(B):
        for n in range(K * G):
            segment = slice(starts[b, n // G], starts[b, n // G] + lengths[b, n // G])
            expected[b, n] = attend(q64[b, n], k64[b, segment], v64[b, segment], 0.2)[0]
    check(out, expected, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_quantized_entries_equal_dequantized_ones(dtype, kind, implementation):
    """All three operations; the scales of dead slots are NaN."""
    rng, B, K, G, S, H = np.random.default_rng(4), 2, 2, 4, 48, 32
    lengths = jnp.asarray([40, 7], jnp.int32)
    dead = jnp.arange(S)[None] >= lengths[:, None]

    def entries(*shape):
        return quantize(random(rng, shape, "float32")[0], jnp.dtype(kind))

    def poisoned(x, dead):
        return Quantized(x.values, jnp.where(dead, jnp.nan, x.scale))

    def full(x):
        return dequantize(x, jnp.float32)

    settings = {"scale": 0.2, "implementation": implementation}
    q = random(rng, (B, K * G, H), dtype)[0]
    q32 = q.astype(jnp.float32)
    k, v = entries(B, K, S, H), entries(B, K, S, H)
    want = pallas_kernels.gqa_decode(q32, full(k), full(v), lengths, scale=0.2)
    k, v = (poisoned(x, dead[:, None]) for x in (k, v))
    check(pallas_kernels.gqa_decode(q, k, v, lengths, **settings), np.asarray(want), dtype)

    k, v, starts = entries(B, S, H), entries(B, S, H), (0, 20)
    held = jnp.asarray([[20, 28], [3, 11]], jnp.int32)
    want = pallas_kernels.ragged_gqa_decode(q32, full(k), full(v), starts, held, scale=0.2)
    rank = jnp.arange(S) - jnp.where(jnp.arange(S) < 20, 0, 20)
    gone = rank[None] >= jnp.repeat(held, np.array([20, 28]), axis=1, total_repeat_length=S)
    k, v = (poisoned(x, gone) for x in (k, v))
    got = pallas_kernels.ragged_gqa_decode(q, k, v, starts, held, **settings)
    check(got, np.asarray(want), dtype)

    q_rope = random(rng, (B, K * G, 16), dtype)[0]
    latent, rope = entries(B, S, H), entries(B, S, 16)
    rope32 = q_rope.astype(jnp.float32)
    want = pallas_kernels.mla_decode(q32, rope32, full(latent), full(rope), lengths, 0.2)
    latent, rope = (poisoned(x, dead) for x in (latent, rope))
    got = pallas_kernels.mla_decode(q, q_rope, latent, rope, lengths, **settings)
    check(got, np.asarray(want), dtype)


def test_quantization_rounds_to_the_nearest_step():
    x = jnp.asarray([[0.0, 0.0], [1.27, -0.634], [-300.0, 3.0]])
    got = quantize(x, jnp.int8)
    np.testing.assert_array_equal(got.values, [[0, 0], [127, -63], [-127, 1]])
    np.testing.assert_allclose(got.scale, [1.0, 0.01, 300 / 127], rtol=1e-6)
    np.testing.assert_allclose(dequantize(got, jnp.float32)[1], [1.27, -0.63], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (6, None), (None, 2.0), (6, 2.0)])
@pytest.mark.parametrize(("N", "L", "R"), [(8, 32, 16), (16, 512, 64), (4, 24, 0)])
def test_mla_decode(N, L, R, window, softcap, dtype, implementation):
    rng, lengths, S = np.random.default_rng(2), np.array([0, 1, 40], np.int32), 48
    q_latent, ql = random(rng, (3, N, L), dtype)
    q_rope, qr = random(rng, (3, N, R), dtype)
    latent, c = random(rng, (3, S, L), dtype)
    k_rope, kr = random(rng, (3, S, R), dtype)
    first = np.zeros(3, int) if window is None else np.maximum(lengths - window, 0)
    dead = (np.arange(S)[None] >= lengths[:, None]) | (np.arange(S)[None] < first[:, None])
    poison = jnp.asarray(dead)[..., None]
    out = pallas_kernels.mla_decode(
        q_latent,
        q_rope,
        jnp.where(poison, jnp.nan, latent),
        jnp.where(poison, jnp.nan, k_rope),
        jnp.asarray(lengths),
        0.1,
        window=window,
        softcap=softcap,
        implementation=implementation,
    )
    expected = np.zeros((3, N, L))
    for b in range(3):
        seen = slice(first[b], lengths[b])
        keys = np.concatenate([c[b], kr[b]], axis=-1)[seen]
        for n in range(N):
            query = np.concatenate([ql[b, n], qr[b, n]])
            expected[b, n] = attend(query, keys, c[b, seen], 0.1, softcap)[0]
    check(out, expected, dtype)


def test_arguments_are_checked():
    q, k = jnp.zeros((2, 6, 8)), jnp.zeros((2, 4, 16, 8))
    lengths = jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match="6 query heads are no multiple of 4 KV heads"):
        pallas_kernels.gqa_decode(q, k, k, lengths)
    q = jnp.zeros((2, 8, 8))
    with pytest.raises(ValueError, match=r"lengths is \(3,\), expected \(2,\)"):
        pallas_kernels.gqa_decode(q, k, k, jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"k is \(2, 4, 16, 9\), expected \(2, 4, 16, 8\)"):
        pallas_kernels.gqa_decode(q, jnp.zeros((2, 4, 16, 9)), k, lengths)
    with pytest.raises(ValueError, match="'cuda' is none of auto, xla"):
        pallas_kernels.gqa_decode(q, k, k, lengths, implementation="cuda")
    with pytest.raises(NotImplementedError, match="gqa_decode has no pallas_tpu"):
        pallas_kernels.gqa_decode(q, k, k, lengths, implementation="pallas_tpu")
    pool = jnp.zeros((2, 10, 8))
    with pytest.raises(ValueError, match="segment 8:12 is outside of the pool's 10 rows"):
        pallas_kernels.ragged_gqa_decode(
            q, pool, pool, (0, 8), jnp.zeros((2, 2), jnp.int32), capacities=(8, 4)
        )
