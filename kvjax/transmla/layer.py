"""One layer: the original one, and the converted one in its two forms and in the absorbed form.

Calibration and the least-squares refits run the original layer with `Heads`, `attention_logits` and
`attention_weights`. The converted layer is a `LatentLayer` in fp64. Its parameters have one of two
forms: `over_heads` ("post") keeps the projections of GQA, `folded` ("fold") multiplies the maps
into them. For the absorbed form, `cache_entries` computes what is cached, and `latent_logits` the
logits of queries against the cached entries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import visible
from kvjax.checks import CONVERTED, check_finite, rounded
from kvjax.config import (
    AttentionConfig,
    DecoupledConfig,
    GQAConfig,
    MLAConfig,
    RopeConfig,
    SelectedPairs,
    of_kind,
)
from kvjax.mesh import mesh_of
from kvjax.nn.attention import gqa_heads
from kvjax.nn.layers import rope
from kvjax.nn.transformer import Block, Transformer, attention_input, text_positions
from kvjax.sharding import place_params
from pallas_kernels.entries import NEG_INF, soft_cap

GROUP = 8  # sequences that a refit works on at a time
HIGHEST = jax.lax.Precision.HIGHEST


def gqa_layers(model: Transformer) -> list[GQAConfig]:
    """The attention configs of all layers.

    Raises:
        ValueError: a layer that is not GQA; names the first.
    """
    configs = [layer.attention for layer in model.config.layers]
    others = [index for index, c in enumerate(configs) if type(c) is not GQAConfig]
    if others:
        kind = type(configs[others[0]]).__name__
        raise ValueError(
            f"{len(others)} layers have no grouped-query attention, which TransMLA converts: layer "
            f"{others[0]} has {kind}, expected GQAConfig"
        )
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
    mesh = mesh_of(params)
    return converted, new if mesh is None else place_params(converted, new, mesh)


# --- The original layer ---------------------------------------------------------------------------


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


def attention_logits(
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
    """Softmax of the attention logits over the keys that each query sees; fp32.

    Args:
        at: [Q] positions of the queries; the keys have positions 0 … S − 1.
    """
    keys = jnp.arange(s_BNQS.shape[3], dtype=jnp.int32)
    mask = visible(at[None], keys[None], base.window)[:, None]
    return jax.nn.softmax(jnp.where(mask, soft_cap(s_BNQS, base.softcap), NEG_INF), axis=-1)


# --- The converted layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentLayer:
    """Latent attention over the keys and values x = [k ; v] of GQA, X = 2·K·H numbers.

    Attributes:
        down: [X, L], from x to the cached latent.
        key_rope: [X, R], from x to the cached rotary key, before RoPE.
        query_rope: [N, H, R], from the query of a head to its rotary part.
        k_up, v_up: [L, N, H] and [L, N, V], from the latent to the keys and values of a head.
        out, out_bias: [N, V, D] and [D], the output projection.
        rope: RoPE of the R rotating components; None for R = 0.
    """

    down: Float[np.ndarray, "X L"]
    key_rope: Float[np.ndarray, "X R"]
    query_rope: Float[np.ndarray, "N H R"]
    k_up: Float[np.ndarray, "L N H"]
    v_up: Float[np.ndarray, "L N V"]
    out: Float[np.ndarray, "N V D"]
    out_bias: Float[np.ndarray, " D"]
    rope: RopeConfig | None


def over_heads(
    base: GQAConfig, attn: Mapping[str, Any], layer: LatentLayer
) -> tuple[DecoupledConfig, dict[str, Any]]:
    """Parameters of decoupled attention: the projections and norms of GQA, then the maps.

    Possible for every model, with QK-norm too.

    Args:
        base, attn: the attention of the original layer and its parameters.
    """
    config = DecoupledConfig(
        base, layer.down.shape[1], layer.rope, layer.out.shape[1], out_bias=True
    )
    kept = {n: attn[n] for n in attn if n.partition("_")[0] in "qkv" and n not in ("o", "o_bias")}
    new = {
        "down": np.concatenate([layer.down, layer.key_rope], axis=1),
        "q_rope": layer.query_rope,
        "k_up": layer.k_up,
        "v_up": layer.v_up,
        "o": layer.out,
        "o_bias": layer.out_bias,
    }
    return config, kept | _cast(new, attn["o"].dtype)


def folded_config(
    base: GQAConfig, rank: int, rope: RopeConfig | None, v_head_dim: int
) -> MLAConfig:
    """The config of folded attention with a latent of width `rank`, a rotary key of rope.dim."""
    return MLAConfig(
        num_heads=base.num_heads,
        qk_nope_head_dim=base.head_dim,
        qk_rope_head_dim=0 if rope is None else rope.dim,
        v_head_dim=v_head_dim,
        kv_lora_rank=rank,
        q_lora_rank=None,
        scale=base.scale,
        rope=rope,
        latent_norm=None,
        query_bias=base.qkv_bias,
        latent_bias=base.qkv_bias,
        out_bias=True,
        window=base.window,
        softcap=base.softcap,
    )


def check_foldable(base: GQAConfig) -> None:
    """Raises ValueError for QK-norm, which comes between projections and maps."""
    if base.qk_norm is not None:
        raise ValueError(
            "the keys have QK-norm, so their projections cannot be folded: expected mode='post' or "
            "'auto', and exportable=False"
        )


def folded(
    base: GQAConfig, attn: Mapping[str, Any], layer: LatentLayer
) -> tuple[MLAConfig, dict[str, Any]]:
    """Parameters of MLA: the maps multiplied into the projections.

    Args:
        base, attn: the attention of the original layer and its parameters.

    Raises:
        ValueError: the model has QK-norm.
    """
    check_foldable(base)
    config = folded_config(base, layer.down.shape[1], layer.rope, layer.out.shape[1])
    joint = np.concatenate([layer.down, layer.key_rope], axis=1)

    def with_rope(q: np.ndarray) -> np.ndarray:
        """Queries [X, N, H], followed by their rotary parts: [X, N, H + R]."""
        turning = np.swapaxes(q, 0, 1) @ layer.query_rope
        return np.concatenate([q, np.swapaxes(turning, 0, 1)], axis=2)

    def heads_to_latent(name: str) -> np.ndarray:
        """Weights or biases of k and v of all heads, through the joint map."""
        parts = [_fp64(attn[f"{p}{name}"]) for p in "kv"]
        return np.concatenate([p.reshape(*p.shape[:-2], -1) for p in parts], axis=-1) @ joint

    new = {
        "q": with_rope(_fp64(attn["q"])),
        "kv_a": heads_to_latent(""),
        "k_up": layer.k_up,
        "v_up": layer.v_up,
        "o": layer.out,
        "o_bias": layer.out_bias,
    }
    if base.qkv_bias:
        new["q_bias"] = with_rope(_fp64(attn["q_bias"])[None])[0]
        new["kv_a_bias"] = heads_to_latent("_bias")
    return config, _cast(new, attn["o"].dtype)


def padded(base: GQAConfig, layer: LatentLayer) -> LatentLayer:
    """The same attention, padded with zeros to the widest possible latent and rotary key."""
    width = 2 * base.num_kv_heads * base.head_dim
    down, k_up, v_up = (_grow(x, axis, width) for x, axis in _latent_axes(layer))
    grown = dataclasses.replace(layer, down=down, k_up=k_up, v_up=v_up)
    if base.rope is None:
        return grown
    K, half = base.num_kv_heads, base.rope.dim // 2
    # The widest rotary key has K components of every frequency; each component of the layer takes
    # the next free one of its frequency.
    pairs = np.repeat(np.arange(half), K)
    taken, slots = np.zeros(half, int), []
    for pair in rotating_pairs(layer):
        slots.append(pair * K + taken[pair])
        taken[pair] += 1
    columns = np.concatenate([slots, half * K + np.asarray(slots)]).astype(int)
    rope = RopeConfig(2 * half * K, scaling=SelectedPairs(base.rope, tuple(map(int, pairs))))

    def spread(matrix: np.ndarray) -> np.ndarray:
        wide = np.zeros((*matrix.shape[:-1], rope.dim))
        wide[..., columns] = matrix
        return wide

    key, query = spread(layer.key_rope), spread(layer.query_rope)
    return dataclasses.replace(grown, key_rope=key, query_rope=query, rope=rope)


def rotating_pairs(layer: LatentLayer) -> tuple[int, ...]:
    """The frequency of each rotating component, an index into those of the original RoPE."""
    if layer.rope is None:
        return ()
    assert isinstance(layer.rope.scaling, SelectedPairs)
    return layer.rope.scaling.pairs


def _latent_axes(layer: LatentLayer) -> list[tuple[np.ndarray, int]]:
    return [(layer.down, 1), (layer.k_up, 0), (layer.v_up, 0)]


def _grow(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    pad = [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
    return np.pad(x, pad)


def _fp64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _cast(params: Mapping[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    return {name: rounded(value, dtype) for name, value in params.items()}


# --- The converted layer in the absorbed form -----------------------------------------------------


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


def latent_logits(
    maps: QueryMaps,
    q: Float[Array, "Q N H"],
    c: Float[Array, "T L"],
    k_rope: Float[Array, "T R"],
    at: Int[Array, " Q"],
    scale: float,
    turn: RopeConfig | None,
) -> Float[Array, "N Q T"]:
    """Attention logits of queries of one sequence and its cache entries, in the absorbed form.

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
    """The number of sequences in a group of `grouped`, where there are `count` in total."""
    return math.gcd(count, GROUP)


def rows(x: jax.Array, inner: int) -> jax.Array:
    """Merges all axes before the last `inner` into one."""
    outer = x.ndim - inner
    return x.reshape(math.prod(x.shape[:outer]), *x.shape[outer:])  # R may be 0: no −1
