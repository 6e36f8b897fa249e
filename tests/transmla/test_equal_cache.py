"""equal_cache: the same function as GQA at step 0, from a cache of the same size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

import kvjax.transmla
from kvjax.cache import cache_bytes
from kvjax.config import (
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from kvjax.nn import Transformer

T = 12
PLAIN = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
VARIANTS = {
    "plain": PLAIN,
    "bias": dataclasses.replace(PLAIN, qkv_bias=True, out_bias=True),
    "head_norm": dataclasses.replace(PLAIN, qk_norm="head"),
    "all_norm": dataclasses.replace(PLAIN, qk_norm="all"),
    "windowed": dataclasses.replace(PLAIN, window=5, softcap=20.0),
    "partial": dataclasses.replace(PLAIN, rope=RopeConfig(4)),
    "nope": dataclasses.replace(PLAIN, rope=None),
    "mha": dataclasses.replace(PLAIN, num_kv_heads=4),
}
INITS = tuple(kvjax.transmla.INITS)
BEFORE_UP = dict.fromkeys(VARIANTS, ("identity", "svd_complex"))
BEFORE_UP |= {"head_norm": ("identity",), "all_norm": ("identity",), "nope": INITS}
VALID = [(variant, init, "after_up") for variant in VARIANTS for init in INITS]
VALID += [(variant, init, "before_up") for variant in VARIANTS for init in BEFORE_UP[variant]]
INVALID = [(v, i) for v in VARIANTS for i in INITS if i not in BEFORE_UP[v]]


@functools.cache
def build(*variants):
    """A tiny model with these layers, its parameters, and its logits for fixed tokens."""
    mlps = (MLPConfig(24), MoEConfig(2, 1, 16))
    layers = tuple(LayerConfig(VARIANTS[v], mlps[i % 2]) for i, v in enumerate(variants))
    tied = len(layers) > 1
    config = ModelConfig("llama", vocab_size=61, hidden_size=32, layers=layers, tie_embeddings=tied)
    model = Transformer(config)
    params = random_params(model)
    return model, params, forward(model, params)


TOKENS = np.random.default_rng(1).integers(0, 61, (2, T)).astype(np.int32)


def forward(model, params):
    return np.asarray(model.apply({"params": params}, TOKENS)[0])


def relative_error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize(("variant", "init", "site"), VALID)
def test_logits_equal_gqa(variant, init, site):
    model, params, want = build(variant)
    converted = kvjax.transmla.convert(model, params, init=init, rope_site=site)
    attention = converted[0].config.layers[0].attention
    assert isinstance(attention, EqualCacheConfig)
    per_head = init in ("svd_per_head", "identity")
    assert attention.latent_heads == (PLAIN.num_kv_heads if per_head else 1) or variant == "mha"
    assert relative_error(forward(*converted), want) < 1e-5


@pytest.mark.parametrize(("variant", "init"), INVALID)
def test_inexact_pairs_are_refused(variant, init):
    model, params, _ = build(variant)
    with pytest.raises(ValueError, match=r"'before_up' is exact with init 'identity'.* svd_global"):
        kvjax.transmla.convert(model, params, init=init, rope_site="before_up")


@pytest.mark.parametrize("init", ["identity", "svd_global"])
@pytest.mark.parametrize("variant", ["plain", "all_norm"])
def test_values_may_have_another_init(variant, init):
    model, params, want = build(variant)
    value_init = "svd_global" if init == "identity" else "identity"
    site = "before_up" if init == "identity" else "after_up"
    converted, new = kvjax.transmla.convert(
        model, params, init=init, value_init=value_init, rope_site=site
    )
    attention = converted.config.layers[0].attention
    assert (attention.latent_heads, attention.key_rank, attention.value_rank) == (1, 16, 16)
    assert relative_error(forward(converted, new), want) < 1e-5


PAIRS = [("svd_global", "after_up"), ("svd_complex", "before_up"), ("identity", "before_up")]


@pytest.mark.parametrize(("init", "site"), PAIRS)
def test_cache_gives_the_full_forward_in_gqas_bytes(init, site):
    model, params, want = build("bias", "windowed")
    converted, new = kvjax.transmla.convert(model, params, init=init, rope_site=site)
    cache = converted.init_cache(2, T, "float32")
    assert cache_bytes(cache) == cache_bytes(model.init_cache(2, T, "float32"))
    apply = converted.apply
    first, cache = apply({"params": new}, TOKENS[:, :9], cache=cache)
    logits = [first]
    for step in range(9, T):
        one, cache = apply({"params": new}, TOKENS[:, step : step + 1], cache=cache)
        logits.append(one)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), want, atol=2e-5)


def test_parameters_are_counted_and_cast_once():
    model, params, _ = build("bias")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    converted, new = kvjax.transmla.convert(model, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert new["layers_0"]["attn"]["q"] is params["layers_0"]["attn"]["q"]
    shapes = jax.eval_shape(converted.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(new))
    more = 2 * (2 * 8) * (4 * 8)  # K and V, [K·H, N·H]: docs/transmla.md
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params)) + more


def test_what_cannot_be_converted_is_refused():
    model, params, _ = build("plain")
    convert = kvjax.transmla.convert
    with pytest.raises(ValueError, match="'decupled' is not one of equal_cache, decoupled"):
        convert(model, params, method="decupled")
    with pytest.raises(ValueError, match="'decoupled' needs either calibration="):
        convert(model, params, method="decoupled")
    with pytest.raises(ValueError, match="'after' is not one of after_up, before_up"):
        convert(model, params, rope_site="after")
    mla = MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4, interleaved=True))
    mixed = Transformer(model.config.with_attention((mla,)))
    with pytest.raises(ValueError, match="layer 0 has MLAConfig, expected GQAConfig"):
        convert(mixed, random_params(mixed))
    again = convert(model, params)
    with pytest.raises(ValueError, match="layer 0 has EqualCacheConfig, expected"):
        convert(*again)
