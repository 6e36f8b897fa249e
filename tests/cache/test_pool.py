"""The flat pool attends like a dense cache whose evicted entries are masked."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from pools import attend, cache_of, empty_pool

from kvjax.cache import AttentionSpec, cache_bytes
from kvjax.cache.pool import bucket_rows

B, K, G, H = 3, 2, 2, 8
CAPACITIES, HELD = (9, 30), ((4, 22), (0, 24), (1, 3))
LENGTHS = (40, 24, 7)
SPECS = [AttentionSpec(0.3), AttentionSpec(0.3, softcap=3.0), AttentionSpec(0.3, window=20)]


def random_cache(rng, keep_positions, align=1):
    """A cache that holds HELD[b][k] entries of random positions, and the same as lists."""
    pool = empty_pool(CAPACITIES, B, H, "float32", keep_positions, align)
    k_pool, v_pool = np.array(pool.k), np.array(pool.v)
    positions = np.full(k_pool.shape[:2], -1, np.int32)
    held = {}
    for b in range(B):
        for head in range(K):
            count, start = HELD[b][head], int(pool.starts[b, 0, head])
            at = np.sort(rng.choice(LENGTHS[b], count, replace=False))
            k, v = rng.standard_normal((2, count, H)).astype(np.float32)
            rows = slice(start, start + count)
            k_pool[b, rows], v_pool[b, rows], positions[b, rows] = k, v, at
            held[b, head] = list(zip(at, k, v, strict=True))
    pool = dataclasses.replace(
        pool,
        k=jnp.asarray(k_pool),
        v=jnp.asarray(v_pool),
        positions=jnp.asarray(positions) if keep_positions else None,
        kept=jnp.asarray(HELD, jnp.int32)[:, None],
        lengths=jnp.asarray(LENGTHS, jnp.int32),
        read=jnp.asarray(LENGTHS, jnp.int32),
    )
    return cache_of(pool), held


def oracle(q, at, entries, spec):
    """Attention of one query at a position over (position, key, value) entries."""
    seen = [e for e in entries if e[0] <= at and (spec.window is None or at - e[0] < spec.window)]
    logits = np.asarray([e[1] @ q for e in seen], np.float64) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    weights = np.exp(logits - logits.max())
    return weights @ np.asarray([e[2] for e in seen]) / weights.sum()


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "softcap", "window"])
@pytest.mark.parametrize("align", [1, 8])
def test_decode_equals_masked_dense_attention(spec, align):
    rng = np.random.default_rng(1)
    cache, held = random_cache(rng, spec.window is not None, align)
    lengths = np.asarray(LENGTHS)
    for T in (1, 1, 3):
        q = rng.standard_normal((B, T, K * G, H)).astype(np.float32)
        k, v = rng.standard_normal((2, B, T, K, H)).astype(np.float32)
        positions = (lengths[:, None] + np.arange(T)).astype(np.int32)
        if T == 3:
            positions[1, 2] = -1  # a shorter row
        out, cache = attend(cache, q, k, v, positions, spec)
        for b in range(B):
            for t in np.flatnonzero(positions[b] >= 0):
                for head in range(K):
                    held[b, head].append((positions[b, t], k[b, t, head], v[b, t, head]))
                for n in range(K * G):
                    expected = oracle(q[b, t, n], positions[b, t], held[b, n // G], spec)
                    np.testing.assert_allclose(out[b, t, n], expected, atol=1e-5)
        lengths = lengths + (positions >= 0).sum(1)
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_surplus_is_dropped_and_shows():
    cache, _ = random_cache(np.random.default_rng(2), False)
    before = np.asarray(cache.pools[0].k)
    q, new = jnp.ones((B, 6, K * G, H)), jnp.ones((B, 6, K, H))
    np.testing.assert_array_equal(cache[0].capacity, [45, 30, 15])
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None] + 40, (B, 6))
    _, full = attend(cache, q, new, new, positions, SPECS[0])
    assert (np.asarray(full.lengths) > np.asarray(full.capacity)).tolist() == [True, False, False]
    rows = full.pools[0].k[0]
    np.testing.assert_array_equal(rows[4:9], np.ones((5, H)))
    # The next segment is untouched by the surplus of the first.
    np.testing.assert_array_equal(rows[9 : 9 + 22], before[0, 9 : 9 + 22])


def test_segments_are_aligned_and_bytes_are_real():
    pool = empty_pool((9, 30, 16), 2, H, "bfloat16", align=16)
    np.testing.assert_array_equal(pool.starts[:, 0], [[0, 16, 48]] * 2)
    assert pool.k.shape == (2, 64, H)
    pool = empty_pool((9, 30, 16), 2, H, "bfloat16")
    np.testing.assert_array_equal(pool.starts[:, 0], [[0, 9, 39]] * 2)
    assert pool.k.shape[1] == bucket_rows(9 + 30 + 16) == 56
    assert cache_bytes(pool.k) == 2 * 56 * H * 2


def test_what_it_cannot_do():
    cache, _ = random_cache(np.random.default_rng(3), False)
    q, k = jnp.ones((B, 1, K * G, H)), jnp.ones((B, 1, K, H))
    positions = jnp.asarray(LENGTHS, jnp.int32)[:, None]
    with pytest.raises(NotImplementedError, match="rebuild keys from latents"):
        cache[0].attend(q, k, k, positions, SPECS[0], expand=lambda k, positions: k)
    with pytest.raises(ValueError, match="needs a pool with positions"):
        cache[0].attend(q, k, k, positions, SPECS[2])
    uneven = cache_of(dataclasses.replace(cache.pools[0], align=7))
    with pytest.raises(ValueError, match="are not a multiple of align = 7"):
        uneven[0].attend(q, k, k, positions, SPECS[0])
