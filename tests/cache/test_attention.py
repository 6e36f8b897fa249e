"""Tiled attention equals untiled attention, and a numpy oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import attention
from kvjax.cache.attention import AttentionSpec, cached_attention, causal_attention
from pallas_kernels.plan import merge

B, T, S, N, K, H = 2, 21, 37, 4, 2, 8
SPECS = [AttentionSpec(0.3), AttentionSpec(0.3, window=5), AttentionSpec(0.3, softcap=1.5)]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    k = rng.standard_normal((B, S, K, H)).astype(np.float32)
    v = rng.standard_normal((B, S, K, H)).astype(np.float32)
    k_positions = np.broadcast_to(np.arange(S), (B, S)).astype(np.int32).copy()
    k_positions[1, 30:] = -1
    q_positions = np.broadcast_to(np.arange(S - T, S), (B, T)).astype(np.int32).copy()
    q_positions[1, :] -= 7
    return q, k, v, q_positions, k_positions


def oracle(q, k, v, q_positions, k_positions, spec):
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        distance = q_positions[b, t] - k_positions[b]
        seen = (k_positions[b] >= 0) & (distance >= 0)
        if spec.window is not None:
            seen &= distance < spec.window
        logits = k[b, :, n // (N // K)].astype(np.float64) @ q[b, t, n] * spec.scale
        if spec.softcap is not None:
            logits = spec.softcap * np.tanh(logits / spec.softcap)
        weights = np.where(seen, np.exp(logits), 0.0)
        out[b, t, n] = weights / weights.sum() @ v[b, :, n // (N // K)]
    return out


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tile", [4, 256])
def test_causal_attention_in_tiles(arrays, spec, tile, monkeypatch):
    monkeypatch.setattr(attention, "CPU_TILE", (tile, 512))
    got = causal_attention(*map(jnp.asarray, arrays), spec)
    np.testing.assert_allclose(got, oracle(*arrays, spec), atol=2e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("query_tile", "key_tile"), [(256, 512), (4, 8), (256, 8)])
def test_cached_attention_in_tiles(arrays, spec, query_tile, key_tile, monkeypatch):
    monkeypatch.setattr(attention, "CPU_TILE", (query_tile, key_tile))
    q, k, v, q_positions, k_positions = map(jnp.asarray, arrays)
    entries = (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    got, lse = cached_attention(q, *entries, q_positions, k_positions, spec)
    np.testing.assert_allclose(got, oracle(*arrays, spec), atol=2e-6)
    # The lse of two halves of the keys merges to the whole.
    halves = [jnp.where(k_positions % 2 == odd, k_positions, -1) for odd in (0, 1)]
    parts = [cached_attention(q, *entries, q_positions, half, spec) for half in halves]
    out, merged = merge(*parts)
    np.testing.assert_allclose(out, got, atol=2e-6)
    np.testing.assert_allclose(merged, lse, atol=2e-6)


def test_a_query_that_sees_nothing_gets_zeros(arrays):
    q, k, v, q_positions, k_positions = map(jnp.asarray, arrays)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    nobody = jnp.full_like(q_positions, -1)
    out, lse = cached_attention(q, k, v, nobody, k_positions, SPECS[0])
    assert not np.any(out) and np.all(np.asarray(lse) < -1e29)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tile", [8, 512])
def test_cached_attention_rebuilds_keys_a_tile_at_a_time(arrays, spec, tile, monkeypatch):
    monkeypatch.setattr(attention, "CPU_TILE", (256, tile))
    sizes = []

    def expand(latent, positions):
        sizes.append(latent.shape[1])
        return 2.0 * jnp.repeat(latent, N // K, axis=2)

    q, k, v, q_positions, k_positions = map(jnp.asarray, arrays)
    k, v = jnp.swapaxes(0.5 * k, 1, 2), jnp.swapaxes(v, 1, 2)
    got, _ = cached_attention(q, k, v, q_positions, k_positions, spec, expand)
    np.testing.assert_allclose(got, oracle(*arrays, spec), atol=2e-6)
    assert max(sizes) == min(tile, S)
