"""Causal attention of many queries, masked by position; prefill and training run it. `NoCache` is
the attention of a text that nothing continues."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.config import AttentionSpec
from pallas_kernels.api import target
from pallas_kernels.entries import NEG_INF, Entries, dequantize, soft_cap

TILE = 256, 512
"""Queries and keys of one tile. Only one tile of the matrix of logits exists at a time."""
CPU_TILE = 256, 128
"""The same on CPUs. A tile of all heads must fit the processor's cache; a tile that does not fit
costs up to four times as much."""


Expand = Callable[[jax.Array, jax.Array], jax.Array]
"""Rebuilds keys from cached latents: (k [B, S, C, X], positions [B, S]) → [B, S, M, H], for any M
that divides the query heads."""


def visible(
    q_positions: Int[Array, "B T"], k_positions: Int[Array, "B S"], window: int | None
) -> jax.Array:
    """[B, T, S] bool: keys at or before the query and inside its window. Position −1 is padding."""
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
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N Hv"]:
    """Softmax attention of every query over the keys at or before its position.

    Long query blocks are processed one tile of queries at a time. Memory then holds the logits of
    one tile instead of [T, S].

    Args:
        segment_ids: the document of each token, for keys and values that belong to the same tokens
            as the queries (S = T). A query sees only keys of its own document, so documents packed
            into a row stay apart. Positions restart in each document.
    """
    T, size = q_BTNH.shape[1], tile_sizes()[0]

    def attend(q, positions, own):
        mask = visible(positions, k_positions, spec.window)
        if segment_ids is not None:
            mask &= own[:, :, None] == segment_ids[:, None, :]
        return _attend_block(q, k_BSKH, v_BSKH, mask, spec)

    if size >= T:
        return attend(q_BTNH, q_positions, segment_ids)
    # Pad to whole tiles: position −1 sees no key, and the last line cuts the padding off.
    tiles = -(-T // size)
    pad = tiles * size - T
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    positions = jnp.pad(q_positions, ((0, 0), (0, pad)), constant_values=-1)
    own = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    inputs = jax.tree.map(lambda x: _tiled(x, tiles), (q, positions, own))
    out = jax.lax.map(lambda tile: attend(*tile), inputs)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], tiles * size, *out.shape[3:])[:, :T]


@flax.struct.dataclass
class NoCache:
    """Attends over the new entries alone and stores nothing: the full causal forward.

    Attributes:
        segment_ids: [B, T] int32, the document of each token, where a row packs several. A token
            attends only within its document. None: one document per row.
    """

    segment_ids: Any = None

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T M Hv"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], None]:
        """See `kvjax.cache.Cache.attend`."""
        if expand is not None:
            k = expand(k, positions)
        return causal_attention(q, k, v, positions, positions, spec, self.segment_ids), None


def _attend_block(q_BTNH, k_BSKH, v_BSKH, mask_BTS, spec):
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    # Queries of one KV head become rows of one matrix, so that each head is a single product.
    q = _by_head(q_BTNH).reshape(B, K, -1, H)
    logits = jnp.einsum("bkqh,bskh->bkqs", q, k_BSKH, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * spec.scale, spec.softcap).reshape(B, K, N // K, T, S)
    logits = jnp.where(mask_BTS[:, None, None], logits, NEG_INF)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    # XLA:CPU supports bfloat16 products only as a plain batched matmul.
    rows, v_BKSH = weights.reshape(B, K, -1, weights.shape[-1]), jnp.swapaxes(v_BSKH, 1, 2)
    out = jnp.matmul(rows, v_BKSH, preferred_element_type=jnp.float32)
    out = out.reshape(B, N, T, -1).astype(q_BTNH.dtype)
    return jnp.swapaxes(out, 1, 2)


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k: Entries,
    v: Entries,
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    spec: AttentionSpec,
    expand: Expand | None = None,
) -> tuple[Float[Array, "B T N Y"], Float[Array, "B T N"]]:
    """`causal_attention` over cached entries, one tile of keys at a time and without a copy.

    The online softmax (arXiv 2205.14135) merges the partial results of the tiles. A tile that no
    query of the block sees is skipped, so a chunk at the start of a long cache costs little.

    Args:
        k, v: [B, C, S, X] and [B, C, S, Y].
        expand: rebuilds keys from the entries, one tile at a time.

    Returns:
        Outputs and logsumexps in float32; 0 and −1e30 for queries that see no key.
    """
    T, size = q_BTNH.shape[1], tile_sizes()[0]

    if q_BTNH.shape[0] > 1 and T > 1 and expand is None and target().platform == "cpu":
        # One sequence at a time: tiles of one fit the CPU's caches, and each skips its own tiles.
        def alone(arrays):
            q, k, v, queries, keys = jax.tree.map(lambda leaf: leaf[None], arrays)
            found = cached_attention(q, k, v, queries, keys, spec)
            return jax.tree.map(lambda leaf: leaf[0], found)

        return jax.lax.map(alone, (q_BTNH, k, v, q_positions, k_positions))

    def attend(q, positions):
        return _attend_tiles(q, k, v, positions, k_positions, spec, expand)

    if size >= T:
        return attend(q_BTNH, q_positions)
    # Long query blocks: pad to whole tiles, attend to one tile of queries after the other, and
    # join.
    tiles = -(-T // size)
    pad = ((0, 0), (0, tiles * size - T))
    q = _tiled(jnp.pad(q_BTNH, (*pad, (0, 0), (0, 0))), tiles)
    positions = _tiled(jnp.pad(q_positions, pad, constant_values=-1), tiles)
    out, lse = jax.lax.map(lambda tile: attend(*tile), (q, positions))

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], tiles * size, *x.shape[3:])[:, :T]

    return join(out), join(lse)


def tile_sizes() -> tuple[int, int]:
    """Queries and keys of a tile, on the platform that the program is traced for."""
    return CPU_TILE if target().platform == "cpu" else TILE


def _attend_tiles(q_BTNH, k, v, q_positions, k_positions, spec, expand):
    B, T, N, H = q_BTNH.shape
    _, C, S, Y = v.shape
    size = min(tile_sizes()[1], S)
    q_BNTH = _by_head(q_BTNH)

    def merge(tile, state):
        start = jnp.minimum(tile * size, S - size)

        def cut(entries, axis):
            return jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis), entries
            )

        # The last tile may reach back into the tile before it. Mask the keys seen there already.
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= tile * size
        positions = jnp.where(fresh[None], cut(k_positions, 1), -1)
        # One mask decides twice: whether the tile is read at all, and which logits count.
        mask = visible(q_positions, positions, spec.window)[:, None]

        def attend(state):
            top, total, acc = state
            keys = dequantize(cut(k, 2), q_BTNH.dtype)
            if expand is not None:
                keys = jnp.swapaxes(expand(jnp.swapaxes(keys, 1, 2), positions), 1, 2)
            q = q_BNTH.reshape(B, keys.shape[1], -1, H)
            logits = jnp.einsum("bmqh,bmsh->bmqs", q, keys, preferred_element_type=jnp.float32)
            logits = soft_cap(logits.reshape(B, N, T, size) * spec.scale, spec.softcap)
            logits = jnp.where(mask, logits, NEG_INF)
            # Online softmax: scale the sums so far to the new maximum before adding this tile.
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            # The floor is above every masked logit, so masked keys get weight 0 even where a query
            # has seen no key yet and its maximum is itself a masked logit.
            weights = jnp.exp(logits - jnp.maximum(new_top, NEG_INF / 2)[..., None])
            shrink = jnp.exp(top - new_top)
            values = dequantize(cut(v, 2), q_BTNH.dtype)
            rows = weights.astype(values.dtype).reshape(B, C, -1, size)
            # XLA:CPU supports bfloat16 products only as a plain batched matmul.
            out = jnp.matmul(rows, values, preferred_element_type=jnp.float32)
            acc = acc * shrink[..., None] + out.reshape(B, N, T, Y)
            return new_top, total * shrink + jnp.sum(weights, axis=-1), acc

        return jax.lax.cond(jnp.any(mask), attend, lambda state: state, state)

    start = (
        jnp.full((B, N, T), NEG_INF, jnp.float32),
        jnp.zeros((B, N, T), jnp.float32),
        jnp.zeros((B, N, T, Y), jnp.float32),
    )
    top, total, acc = jax.lax.fori_loop(0, -(-S // size), merge, start)
    # A query that sees no key has total 0. Its output is 0, and its lse of −1e30 gives it no weight
    # in a merge.
    divisor = jnp.maximum(total, 1e-30)
    lse = jnp.where(total > 0, top + jnp.log(divisor), NEG_INF)
    return jnp.moveaxis(acc / divisor[..., None], 1, 2), jnp.moveaxis(lse, 1, 2)


def _by_head(x_BTNH: jax.Array) -> jax.Array:
    """[B, N, T, H]. Moving the queries once saves moving the much larger matrix of logits."""
    return jnp.swapaxes(x_BTNH, 1, 2)


def _tiled(x: jax.Array, tiles: int) -> jax.Array:
    """[B, tiles · size, …] → [tiles, B, size, …]."""
    return jnp.moveaxis(x.reshape(x.shape[0], tiles, -1, *x.shape[2:]), 1, 0)
