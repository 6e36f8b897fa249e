"""The inside of one layer, for calibration and the least-squares refits.

The original layer: `Heads`, `scores` and `attention_weights`. The converted layer in the absorbed
form: `cache_entries`, and `latent_scores` of queries against them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import visible
from kvjax.checks import CONVERTED, check_finite
from kvjax.config import AttentionConfig, GQAConfig, RopeConfig, of_kind
from kvjax.mesh import mesh_of
from kvjax.nn.attention import gqa_heads
from kvjax.nn.rope import rope
from kvjax.nn.transformer import Block, Transformer, attention_input, text_positions
from kvjax.sharding import place_params
from kvjax.transmla.latent_layer import LatentLayer
from pallas_kernels.entries import NEG_INF, soft_cap

GROUP = 8  # sequences that a refit works on at a time
HIGHEST = jax.lax.Precision.HIGHEST


def gqa_layers(model: Transformer) -> list[GQAConfig]:
    """The attention configs of all layers.

    Raises:
        ValueError: a layer that is not GQA; names all of them.
    """
    configs = [layer.attention for layer in model.config.layers]
    others = [f"{i}: {type(c).__name__}" for i, c in enumerate(configs) if type(c) is not GQAConfig]
    if others:
        raise ValueError(f"TransMLA converts GQA layers only, got {', '.join(others)}")
    return [of_kind(c, GQAConfig) for c in configs]


def with_attention(
    model: Transformer,
    params: Mapping[str, Any],
    layers: Sequence[tuple[AttentionConfig, dict[str, Any]]],
) -> tuple[Transformer, dict[str, Any]]:
    """The model with another attention in every layer, on the mesh of `params` if there is one.

    Args:
        layers: for each layer, the config of its new attention and the parameters of that.

    Raises:
        ValueError: new parameters hold NaN or infinity.
    """
    new = dict(params)
    for index, (_, attn) in enumerate(layers):
        name = f"layers_{index}"
        check_finite(attn, f"{name}/attn/", CONVERTED)
        new[name] = {**params[name], "attn": attn}
    converted = Transformer(model.config.with_attention(tuple(config for config, _ in layers)))
    return converted, place_params(converted, new, mesh_of(params))


class Heads(NamedTuple):
    """Queries, keys and values of GQA, with QK-norm and without RoPE.

    Attributes:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def of(cls, block: Block, params: dict[str, Any], x: jax.Array) -> Heads:
        """The heads of a block; `x` [B, T, D] is the input of the block, before its norm."""
        y = attention_input(block, params, x)
        return cls(*gqa_heads(gqa_of(block), params["attn"], y))

    def rotated(self, base: GQAConfig) -> Heads:
        """The same heads with RoPE on queries and keys."""
        at, lengths = text_positions(self.q)
        turn = functools.partial(rope, positions_BT=at, lengths_B=lengths, config=base.rope)
        return self._replace(q=turn(self.q), k=turn(self.k))


def gqa_of(block: Block) -> GQAConfig:
    """The attention config of a block that is to be converted."""
    return of_kind(block.layer.attention, GQAConfig)


def scores(
    q_BQNH: Float[Array, "B Q N H"], k_BSKH: Float[Array, "B S K H"], scale: float
) -> Float[Array, "B N Q S"]:
    """Scaled products of rotated queries and keys, before any soft-cap; fp32."""
    B, Q, N, H = q_BQNH.shape
    q = q_BQNH.reshape(B, Q, k_BSKH.shape[2], -1, H)
    s = jnp.einsum("bqkgh,bskh->bkgqs", q, k_BSKH, preferred_element_type=jnp.float32)
    return s.reshape(B, N, Q, -1) * scale


def attention_weights(
    s_BNQS: Float[Array, "B N Q S"], at: jax.Array, base: GQAConfig
) -> Float[Array, "B N Q S"]:
    """Softmax of the scores over the keys that each query sees; fp32.

    Args:
        at: [Q] positions of the queries; the keys have positions 0 … S − 1.
    """
    keys = jnp.arange(s_BNQS.shape[3], dtype=jnp.int32)
    mask = visible(at[None], keys[None], base.window)[:, None]
    return jax.nn.softmax(jnp.where(mask, soft_cap(s_BNQS, base.softcap), NEG_INF), axis=-1)


class CacheMaps(NamedTuple):
    """The maps from keys and values to cache entries, in fp32.

    Attributes:
        down, key_rope: [X, L] and [X, R], as in `LatentLayer`.
    """

    down: jax.Array
    key_rope: jax.Array

    @classmethod
    def of(cls, layer: LatentLayer) -> CacheMaps:
        """The maps of a layer."""
        return cls(_fp32(layer.down), _fp32(layer.key_rope))


class QueryMaps(NamedTuple):
    """The maps from queries to vectors that are compared with cache entries, in fp32.

    Attributes:
        k_up: [L, N, H]; takes the query of a head to a vector of the latent's width.
        query_rope: [N, H, R]; takes the query of a head to its rotary part.
    """

    k_up: jax.Array
    query_rope: jax.Array

    @classmethod
    def of(cls, layer: LatentLayer) -> QueryMaps:
        """The maps of a layer."""
        return cls(_fp32(layer.k_up), _fp32(layer.query_rope))


def _fp32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def cache_entries(
    heads: Heads, maps: CacheMaps, turn: RopeConfig | None
) -> tuple[Float[Array, "B T L"], Float[Array, "B T R"]]:
    """The cache entries of keys and values: latents, and rotary keys with RoPE; fp32.

    Args:
        heads: with keys before RoPE.
        turn: RoPE of the rotary key; None where it has no components.
    """
    B, T = heads.k.shape[:2]
    kv = jnp.concatenate([heads.k, heads.v], axis=2).reshape(B, T, -1).astype(jnp.float32)
    at, lengths = text_positions(kv)
    key = jnp.einsum("btx,xr->btr", kv, maps.key_rope, precision=HIGHEST)
    key = rope(key[:, :, None], at, lengths, turn)[:, :, 0]
    return jnp.einsum("btx,xl->btl", kv, maps.down, precision=HIGHEST), key


def latent_scores(
    maps: QueryMaps,
    q: Float[Array, "Q N H"],
    c: Float[Array, "T L"],
    k_rope: Float[Array, "T R"],
    at: Int[Array, " Q"],
    scale: float,
    turn: RopeConfig | None,
) -> Float[Array, "N Q T"]:
    """The scores of queries of one sequence against its cache entries, in the absorbed form.

    Args:
        q: queries before RoPE.
        c, k_rope: from `cache_entries`.
        at: positions of the queries.
    """
    T = c.shape[0]
    q_rope = jnp.einsum("qnh,nhr->qnr", q, maps.query_rope)
    q_rope = rope(q_rope[None], at[None], jnp.full((1,), T, jnp.int32), turn)[0]
    q_latent = jnp.einsum("qnh,lnh->qnl", q, maps.k_up)
    s = jnp.einsum("qnl,tl->nqt", q_latent, c) + jnp.einsum("qnr,tr->nqt", q_rope, k_rope)
    return s * scale


def grouped(x: Float[Array, "S T D"]) -> Float[Array, "groups g T D"]:
    """Groups of up to GROUP sequences, because one sequence is too small to fill a processor."""
    return x.reshape(-1, group_size(len(x)), *x.shape[1:])


def group_size(count: int) -> int:
    """The number of sequences in a group of `grouped`, where there are `count` in all."""
    return math.gcd(count, GROUP)


def rows(x: jax.Array, inner: int) -> jax.Array:
    """Merges all axes before the last `inner` into one."""
    outer = x.ndim - inner
    return x.reshape(math.prod(x.shape[:outer]), *x.shape[outer:])  # R may be 0: no −1
