"""The weights of one converted layer in fp64, and the two forms of parameters they can take.

`over_heads` ("post") keeps the projections of GQA, `folded` ("fold") multiplies the maps into them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.checks import rounded
from kvjax.config import DecoupledConfig, GQAConfig, MLAConfig, RopeConfig, SelectedPairs


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
    """Parameters of `DecoupledAttention`: the projections and norms of GQA, then the maps.

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


def folded(
    base: GQAConfig, attn: Mapping[str, Any], layer: LatentLayer
) -> tuple[MLAConfig, dict[str, Any]]:
    """Parameters of `MLA`: the maps multiplied into the projections.

    Args:
        base, attn: the attention of the original layer and its parameters.

    Raises:
        ValueError: the model has QK-norm, which comes between projections and maps.
    """
    if base.qk_norm is not None:
        raise ValueError("keys with QK-norm cannot be folded into their projections; mode='post'")
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
