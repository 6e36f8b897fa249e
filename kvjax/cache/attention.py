"""Causal attention of many queries, by position: what prefill and training run."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.reference import NEG_INF, soft_cap

QUERY_TILE = 256  # rows of the score matrix that exist at a time
KEY_TILE = 512  # slots whose keys are rebuilt at a time


@dataclass(frozen=True)
class AttentionSpec:
    """What attention does to its logits: scale, sliding window, soft-cap (see GQAConfig)."""

    scale: float
    window: int | None = None
    softcap: float | None = None


Expand = Callable[[jax.Array, jax.Array], jax.Array]
"""Rebuilds keys from cached latents: (k [B, S, C, X], positions [B, S]) → [B, S, M, H], for any M
that divides the query heads."""


def visible(
    q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], window: int | None
) -> jax.Array:
    """[B, T, S] bool: keys at or before the query, inside its window; −1 is padding."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (distance >= 0) & (k_positions >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K Hv"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    spec: AttentionSpec,
) -> Float[Array, "B T N Hv"]:
    """Softmax attention of every query over the keys at or before its position.

    Long query blocks are worked off QUERY_TILE rows at a time, so that the scores of one tile,
    not [T, S], are what memory must hold.
    """
    T = q_BTNH.shape[1]

    def attend(q, positions):
        return _attend_block(q, k_BSKH, v_BSKH, visible(positions, k_positions, spec.window), spec)

    if T <= QUERY_TILE:
        return attend(q_BTNH, q_positions)
    tiles = -(-T // QUERY_TILE)
    pad = tiles * QUERY_TILE - T
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    positions = jnp.pad(q_positions, ((0, 0), (0, pad)), constant_values=-1)
    out = jax.lax.map(lambda tile: attend(*tile), (_split(q, tiles), _split(positions, tiles)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], tiles * QUERY_TILE, *out.shape[3:])[:, :T]


def _attend_block(q_BTNH, k_BSKH, v_BSKH, mask_BTS, spec):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q = q_BTNH.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * spec.scale, spec.softcap)
    logits = jnp.where(mask_BTS[:, None, None], logits, NEG_INF)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    # A plain batched product, rows by columns: XLA:CPU refuses other forms of it in bfloat16.
    rows, v_BKSH = weights.reshape(B, K, -1, weights.shape[-1]), jnp.swapaxes(v_BSKH, 1, 2)
    out = jnp.matmul(rows, v_BKSH, preferred_element_type=jnp.float32)
    out = out.reshape(B, N, T, -1).astype(q_BTNH.dtype)
    return jnp.swapaxes(out, 1, 2)


def expanded_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSCX: Float[Array, "B S C X"],
    v_BSCY: Float[Array, "B S C Y"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    spec: AttentionSpec,
    expand: Expand,
) -> Float[Array, "B T N Y"]:
    """`causal_attention` with keys that `expand` rebuilds, KEY_TILE slots at a time.

    The partial results of the tiles are merged by the online softmax (arXiv 2205.14135), so that
    no more than one tile of rebuilt keys exists. Values are used as they are cached.
    """
    B, T, N, _ = q_BTNH.shape
    S, C, Y = v_BSCY.shape[1:]
    size = min(KEY_TILE, S)
    tiles = -(-S // size)
    pad = ((0, 0), (0, tiles * size - S))
    k = jnp.pad(k_BSCX, (*pad, (0, 0), (0, 0)))
    v = jnp.pad(v_BSCY, (*pad, (0, 0), (0, 0)))
    positions = jnp.pad(k_positions, pad, constant_values=-1)

    def merge(state, tile):
        top, total, acc = state
        k_tile, values, tile_positions = tile
        keys = expand(k_tile, tile_positions)
        q = q_BTNH.reshape(B, T, keys.shape[2], -1, keys.shape[3])
        logits = jnp.einsum("btmgh,bsmh->bmgts", q, keys, preferred_element_type=jnp.float32)
        logits = soft_cap(logits * spec.scale, spec.softcap).reshape(B, N, T, size)
        mask = visible(q_positions, tile_positions, spec.window)[:, None]
        logits = jnp.where(mask, logits, NEG_INF)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.where(mask, jnp.exp(logits - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        grouped = weights.astype(values.dtype).reshape(B, C, N // C, T, size)
        out = jnp.einsum("bcgts,bscy->bcgty", grouped, values, preferred_element_type=jnp.float32)
        acc = acc * shrink[..., None] + out.reshape(B, N, T, Y)
        return (new_top, total * shrink + jnp.sum(weights, axis=-1), acc), None

    start = (
        jnp.full((B, N, T), NEG_INF, jnp.float32),
        jnp.zeros((B, N, T), jnp.float32),
        jnp.zeros((B, N, T, Y), jnp.float32),
    )
    split = functools.partial(_split, tiles=tiles)
    (_, total, acc), _ = jax.lax.scan(merge, start, (split(k), split(v), split(positions)))
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 1, 2).astype(q_BTNH.dtype)


def _split(x: jax.Array, tiles: int) -> jax.Array:
    """[B, tiles · size, …] → [tiles, B, size, …]."""
    return jnp.moveaxis(x.reshape(x.shape[0], tiles, -1, *x.shape[2:]), 1, 0)
