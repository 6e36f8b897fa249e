"""Prefill and decode through a cache equal the full forward, for every kind of attention."""

import functools

import jax
import numpy as np
import pytest
from toys import random_params

from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SelectedPairs,
)
from kvjax.nn import Transformer

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8), qkv_bias=True, qk_norm="head")
WINDOWED = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(4), window=5, softcap=20.0)
ATTENTIONS = {
    "gqa": GQA,
    "windowed": WINDOWED,
    "global_after": EqualCacheConfig(GQA, 1, 16, 16),
    "global_before": EqualCacheConfig(GQA, 1, 16, 16, "before_up"),
    "heads_before": EqualCacheConfig(GQA, 2, 8, 8, "before_up"),
    "heads_after": EqualCacheConfig(WINDOWED, 2, 8, 8),
    "mla": MLAConfig(4, 8, 4, 8, 12, 6, 12**-0.5, RopeConfig(4, interleaved=True)),
    "mla_windowed": MLAConfig(
        *(
            4,
            8,
            4,
            6,
            12,
            None,
            12**-0.5,
            RopeConfig(4, scaling=SelectedPairs(RopeConfig(8), (2, 2))),
        ),
        latent_norm=None,
        query_bias=True,
        latent_bias=True,
        out_bias=True,
        window=5,
        softcap=20.0,
    ),
    "mla_no_rope": MLAConfig(4, 8, 0, 8, 12, None, 8**-0.5, None),
    "decoupled": DecoupledConfig(GQA, 12, RopeConfig(4), v_head_dim=6, out_bias=True),
    "decoupled_windowed": DecoupledConfig(WINDOWED, 12, None, v_head_dim=8),
}
T, ROOM = 24, 26  # one size of caches: tests share their programs
FEED_FORWARD = MLPConfig(48), MoEConfig(4, 2, 16)
DEEP = ("gqa", "windowed", "mla")  # with both kinds of layers; one layer shows what a cache does


@functools.cache
def build(name):
    """Model, parameters, tokens, the jitted forward and its logits; shared by all tests."""
    attention = ATTENTIONS[name]
    count = len(FEED_FORWARD) if name in DEEP else 1
    layers = tuple(LayerConfig(attention, each) for each in FEED_FORWARD[:count])
    config = ModelConfig("llama", vocab_size=97, hidden_size=32, layers=layers)
    model = Transformer(config)
    tokens = np.random.default_rng(1).integers(0, 97, (2, T)).astype(np.int32)
    params = {"params": random_params(model)}
    apply = jax.jit(model.apply, static_argnames="logits_at")
    full, no_cache = apply(params, tokens)
    assert no_cache is None
    return model, params, tokens, apply, np.asarray(full)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("chunks", [(1,) * T, (7, 1, 1, 7, 1, 7), (T,)])
def test_any_split_equals_full_forward(name, chunks):
    model, params, tokens, apply, full = build(name)
    cache, outs, start = model.init_cache(2, ROOM, "float32"), [], 0
    for chunk in chunks:
        out, cache = apply(params, tokens[:, start : start + chunk], cache=cache)
        outs.append(out)
        start += chunk
    np.testing.assert_allclose(np.concatenate(outs, axis=1), full, atol=2e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_right_padding_changes_nothing(name):
    model, params, tokens, apply, full = build(name)
    steps = np.arange(T, dtype=np.int32)[None]
    positions = np.where(steps < [[T], [9]], steps, -1).astype(np.int32)
    cache = model.init_cache(2, ROOM, "float32")
    last, cache = apply(params, tokens, positions, cache, logits_at="last")
    last = np.asarray(last)
    np.testing.assert_allclose(last[0, 0], full[0, -1], atol=2e-5)
    np.testing.assert_allclose(last[1, 0], full[1, 8], atol=2e-5)
    assert cache[0].lengths.tolist() == [T, 9]
    # The short row goes on where its own tokens ended.
    after, _ = apply(params, tokens[:, 9:10], cache=cache)
    np.testing.assert_allclose(np.asarray(after)[1, 0], full[1, 9], atol=2e-5)


def test_overflow_is_an_error_outside_jit_and_dropped_inside():
    model, params, tokens, apply, _ = build("gqa")
    cache = model.init_cache(2, ROOM, "float32")
    for part in (tokens, tokens[:, :1], tokens[:, :1]):
        _, cache = apply(params, part, cache=cache)
    with pytest.raises(ValueError, match="room for 26 tokens per sequence, got 27"):
        model.apply(params, tokens[:, :1], cache=cache)
    _, after = apply(params, tokens[:, :1], cache=cache)
    assert after[0].lengths.tolist() == [ROOM + 1, ROOM + 1]
    np.testing.assert_array_equal(after[0].k, cache[0].k)


def test_cache_bytes_are_what_was_asked_for():
    model = build("gqa")[0]
    cache = model.init_cache(3, 40)
    numbers = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert numbers == 2 * 3 * 40 * (2 * 2 * 8) * 2 + 2 * 3 * 4
