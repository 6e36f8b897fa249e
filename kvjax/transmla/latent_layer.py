"""The weights of one converted layer, in fp64, and the two ways to lay them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.checks import rounded
from kvjax.config import DecoupledConfig, GQAConfig, MLAConfig, RopeConfig
from kvjax.transmla.low_rank import LowRank
from kvjax.transmla.rotary import RotarySplit


@dataclass(frozen=True)
class LatentLayer:
    """Latent attention over the keys and values x = [k ; v] of GQA, X = 2·K·H numbers.

    Attributes:
        down: [X, L], what is cached as the latent.
        key_rope: [X, R], what is cached as the rotary key, before RoPE.
        query_rope: [N, H, R], a head's query to its rotary part.
        k_up, v_up: [L, N, H] and [L, N, V].
        out, out_bias: [N, V, D] and [D].
        rope: of the R rotating components; None for R = 0.
    """

    down: Float[np.ndarray, "X L"]
    key_rope: Float[np.ndarray, "X R"]
    query_rope: Float[np.ndarray, "N H R"]
    k_up: Float[np.ndarray, "L N H"]
    v_up: Float[np.ndarray, "L N V"]
    out: Float[np.ndarray, "N V D"]
    out_bias: Float[np.ndarray, " D"]
    rope: RopeConfig | None


def assemble(
    split: RotarySplit,
    low_rank: LowRank,
    out: Float[np.ndarray, "N H D"],
    out_bias: Float[np.ndarray, " D"],
) -> LatentLayer:
    """Rotary split and joint PCA as one layer; the constant of the values goes to the output."""
    N, H, _ = out.shape
    W, n = split.key_nope.shape
    K = W // H
    basis = np.zeros((2 * W, n + W))  # x = [k ; v] → [k_nope ; v]
    basis[:W, :n], basis[W:, n:] = split.key_nope, np.eye(W)
    key_up, value_up = low_rank.up[:, :n], low_rank.up[:, n:].reshape(-1, K, H)
    constant = low_rank.constant[n:].reshape(K, H)
    return LatentLayer(
        down=basis @ low_rank.down,
        key_rope=np.concatenate([split.key_rope, np.zeros_like(split.key_rope)]),
        query_rope=split.query_rope,
        k_up=np.einsum("lw,nhw->lnh", key_up, split.query_nope, optimize=True),
        v_up=np.repeat(value_up, N // K, axis=1),
        out=out,
        out_bias=out_bias + np.einsum("nh,nhd->d", np.repeat(constant, N // K, axis=0), out),
        rope=split.rope,
    )


def over_heads(
    base: GQAConfig, attn: Mapping[str, Any], layer: LatentLayer
) -> tuple[DecoupledConfig, dict[str, Any]]:
    """The layout that keeps the projections and norms of GQA: for any family."""
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
    """The attention that `folded` gives: a latent of width `rank`, a rotary key of rope.dim."""
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
    """Multi-head latent attention proper: the maps are multiplied into the projections.

    Raises:
        ValueError: QK-norm, which stands between projections and maps.
    """
    if base.qk_norm is not None:
        raise ValueError("keys with QK-norm cannot be folded into their projections; mode='post'")
    config = folded_config(base, layer.down.shape[1], layer.rope, layer.out.shape[1])
    joint = np.concatenate([layer.down, layer.key_rope], axis=1)

    def with_rope(q: np.ndarray) -> np.ndarray:
        """Queries [X, N, H], and behind them their rotary parts."""
        turning = np.swapaxes(q, 0, 1) @ layer.query_rope
        return np.concatenate([q, np.swapaxes(turning, 0, 1)], axis=2)

    def heads_to_latent(name: str) -> np.ndarray:
        """k and v (weights or biases) of all heads through the joint map."""
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


def low_rank_query(
    config: MLAConfig,
    attn: Mapping[str, Any],
    rank: int,
    input_second: Float[np.ndarray, "D D"],
) -> tuple[MLAConfig, dict[str, Any]]:
    """Folded attention whose query projection has a given rank: PCA of the queries it gives.

    Args:
        input_second: E[yᵀy] of the attention's input.
    """
    wide = _fp64(attn["q"]).reshape(len(input_second), -1)
    values, vectors = np.linalg.eigh(input_second)
    scale = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
    outputs = root @ wide
    leading = np.linalg.eigh(outputs @ outputs.T)[1][:, ::-1][:, :rank]
    q = (leading.T @ outputs).reshape(rank, *attn["q"].shape[1:])
    new = _cast({"q_a": inverse @ leading, "q": q}, attn["q"].dtype)
    if config.latent_bias:  # the down-projections share it; the query's own bias comes after
        new["q_a_bias"] = jnp.zeros((rank,), attn["q"].dtype)
    return dataclasses.replace(config, q_lora_rank=rank), {**attn, **new}


def _fp64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _cast(params: Mapping[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    return {name: rounded(value, dtype) for name, value in params.items()}
