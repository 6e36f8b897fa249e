"""Keys normalised by channel: attention that does not notice, for any prompt and any cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import AttentionSpec, DenseCache, cache_bytes
from kvjax.cache.channels import KeyChannels, channel_bytes
from kvjax.config import GQAConfig, RopeConfig
from pallas_kernels import quantize

B, K, G, S, H, NEW = 3, 2, 2, 40, 64, 6
LENGTHS = np.asarray([40, 23, 1], np.int32)


def prompt(seed=0):
    """Keys [B, K, S, H] whose channels differ in size by 400 and are far from 0, and values."""
    rng = np.random.default_rng(seed)
    size, centre = np.exp(1.5 * rng.standard_normal((2, 1, K, 1, H)))
    k = size * rng.standard_normal((B, K, S + NEW, H)) + 4 * centre
    return k.astype(np.float32), rng.standard_normal((B, K, S + NEW, H)).astype(np.float32)


def live(slots):
    return jnp.arange(slots)[None] < LENGTHS[:, None]


def cached(k, v, spec, dtype):
    """A dense cache of the prompts in `dtype`, with room for the new tokens."""
    dense = DenseCache.create(B, K, S + NEW, H, H, "float32")
    held = live(S + NEW)[:, None, :, None]
    dense = dataclasses.replace(
        dense, k=jnp.where(held, k, 0), v=jnp.where(held, v, 0), lengths=jnp.asarray(LENGTHS)
    )
    return dense.cast(dtype, live(S + NEW), spec)


def after_new_tokens(cache, k, v, spec, together):
    """What the new tokens attend to, given at once or one by one."""
    q = np.random.default_rng(9).standard_normal((B, NEW, K * G, H)).astype(np.float32) / 4
    run, outs = jax.jit(DenseCache.attend, static_argnames="spec"), []
    for part in [slice(0, NEW)] if together else [slice(i, i + 1) for i in range(NEW)]:
        at = LENGTHS[:, None] + np.arange(NEW, dtype=np.int32)[None, part]
        new = (x[:, :, S:][:, :, part].swapaxes(1, 2) for x in (k, v))
        out, cache = run(cache, q[:, part], *new, at, spec=spec)
        outs.append(out)
    return np.concatenate(outs, axis=1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 9])
def test_normalised_keys_give_the_same_attention(softcap, window):
    """Queries times s, keys minus c over s: exact, with a soft-cap too, whose centre is 0."""
    spec, (k, v) = AttentionSpec(0.3, window, softcap), prompt()
    plain = cached(k, v, spec, None)
    channels = KeyChannels.of_prompt(plain.k, live(S + NEW)[:, None], spec)
    assert bool(jnp.any(channels.centre != 0)) == (softcap is None)
    stored = dataclasses.replace(plain, k=channels.normalised(plain.k, axis=2), channels=channels)
    np.testing.assert_allclose(stored.keys_and_values()[0], plain.k, rtol=1e-4, atol=1e-3)
    for together in (False, True):
        want = after_new_tokens(plain, k, v, spec, together)
        got = after_new_tokens(stored, k, v, spec, together)
        np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    "dtype, bound, share", [("int4", 0.05, 0.7), ("int8", 0.005, 0.7), ("float8_e4m3fn", 0.02, 1.1)]
)
def test_small_entries_are_near_where_channels_differ(dtype, bound, share, softcap):
    """Rows quantized without normalisation lose their small channels beside the large ones. Floats
    of 8 bits are as exact for small numbers, and gain by the centre alone."""
    spec, (k, v) = AttentionSpec(0.02, None, softcap), prompt()
    plain, packed = cached(k, v, spec, None), cached(k, v, spec, dtype)
    bare = dataclasses.replace(plain, k=quantize(plain.k, jnp.dtype(dtype)), v=packed.v)
    want, near, far = (
        after_new_tokens(cache, k, v, spec, False) for cache in (plain, packed, bare)
    )
    assert np.abs(near - want).mean() < bound
    assert np.abs(near - want).mean() < share * np.abs(far - want).mean()


def test_padding_changes_no_channel_and_one_token_is_enough():
    k = jnp.asarray(prompt()[0])
    spec = AttentionSpec(1.0)
    short = KeyChannels.of_prompt(k[:, :, :S], live(S)[:, None], spec)
    padded = k.at[:, :, S:].set(jnp.nan)
    long = KeyChannels.of_prompt(padded, live(S + NEW)[:, None], spec)
    for a, b in zip(*map(jax.tree.leaves, (short, long)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(short.size[2]) == 1).all()  # the prompt of one token has no range
    assert np.isfinite(np.asarray(short.centre, np.float32)).all()


def test_the_bytes_of_channels_are_counted():
    attention = GQAConfig(K * G, K, H, 0.3, RopeConfig(H))
    k, v = prompt()
    spec = AttentionSpec(0.3)
    cache = cached(k, v, spec, "int4")
    assert cache_bytes(cache.channels) == B * channel_bytes(attention, "int4") == B * K * H * 4
    assert channel_bytes(attention, "int8") == channel_bytes(attention, "int4")
    assert channel_bytes(attention, "bfloat16") == 0
    rows = B * K * (S + NEW) * 2 * (H // 2 + 2 * 4)
    assert cache_bytes(cache) == rows + cache_bytes(cache.channels) + 4 * B
