"""Attention over the segments of a pool in plain jnp: the implementation for CPUs, and for packed
entries on every platform.

The live rows of each segment are cut into tiles of equal size. A loop computes C tiles a turn,
and the number of turns is data, so that time follows the live rows. A turn slices its tiles out
of the pool and reads no other row: a pool may hold the rows of all layers of a model.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.entries import NEG_INF, Entries, Newer, Quantized, Segments, plain, soft_cap

ROWS = 128
"""Rows of a tile (measured): more need fewer turns, fewer have fewer dead rows."""


class Turn(NamedTuple):
    """The C tiles of one turn of the loop, which belong to at most C consecutive segments.

    Attributes:
        first: the first of these segments.
        owner: [C] the segment of each tile, counted from `first`.
        sequence, row: [C] where each tile starts in the pool.
        live: [C, R] which rows of a tile are live and not part of an earlier tile.
        following: the first segment of the next turn.
    """

    first: Int[Array, ""]
    owner: Int[Array, " C"]
    sequence: Int[Array, " C"]
    row: Int[Array, " C"]
    live: Bool[Array, "C R"]
    following: Int[Array, ""]


class Softmax(NamedTuple):
    """The online softmax (arXiv 2205.14135) of Q queries of each segment, fp32.

    Attributes:
        top: [V, Q] the largest logit so far.
        total: [V, Q] the sum of the weights exp(logit − top).
        out: [V, Q, Y] the sum of weights · values.
    """

    top: Float[Array, "V Q"]
    total: Float[Array, "V Q"]
    out: Float[Array, "V Q Y"]


def attend(
    q: Float[Array, "B T N H"],
    k_pool: Entries,
    v_pool: Entries,
    segments: Segments,
    lengths: Int[Array, "B K"],
    scale: float,
    softcap: float | None,
    live: Bool[Array, "B T P"] | Bool[Array, "B 1 P"] | Newer | None = None,
) -> tuple[Float[Array, "B T N Y"], Float[Array, "B T N"]]:
    """Attention of T queries over the first lengths[b, k] rows of each segment.

    Args:
        q, k_pool, v_pool, segments, lengths, scale, softcap: as in `ragged_gqa_decode`, with an
            axis of T queries.
        live: which of these rows each query may see; default all.

    Returns:
        out and lse, fp32.
    """
    (B, T, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    U, G, R = B * K, N // K, min(ROWS, P)
    C = 4 if U <= 8 else 8  # more tiles a turn pay off with many segments (measured)

    # The T · G queries of a KV head read the same rows: [U, T · G, H]. The C empty segments behind
    # the last one let a turn always slice C segments.
    tiles = _tiles(segments, jnp.clip(lengths, 0, segments.room(P)), (C, R))
    queries = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 2).reshape(U, T * G, H)
    queries = jnp.pad(queries, ((0, C), (0, 0), (0, 0)))

    def step(number: jax.Array, state: tuple[Turn, Softmax]) -> tuple[Turn, Softmax]:
        turn, softmax = state
        # Masked logits of the turn's tiles, [C, T · G, R].
        logits = _logits(_consecutive(queries, turn.first, C)[turn.owner], _cut(k_pool, turn))
        seen = turn.live[:, None]
        if live is not None:
            seen = seen & _shown(live, turn, T * G)
        logits = jnp.where(seen, soft_cap(logits * scale, softcap), NEG_INF)
        # The softmax of the C segments that these tiles can belong to, and back into the state.
        part = _consecutive(softmax, turn.first, C)
        part = _update(part, turn, logits, _cut_live(v_pool, turn), q.dtype)
        # Each turn computes where the next turn's tiles start. Computed in the same turn, XLA:CPU
        # would fuse that into the copy of a tile, and repeat it for every number that it copies.
        following = _turn(tiles, turn.following, (number + 1) * C, (C, R), P)
        return following, _replace(softmax, part, turn.first)

    zero = jnp.zeros((), jnp.int32)
    state = _turn(tiles, zero, zero, (C, R), P), _nothing(U + C, T * G, v_pool.shape[2])
    _, softmax = jax.lax.fori_loop(0, -(-tiles[U - 1, 1] // C), step, state)

    # Divide, and undo the grouping by KV head. Segments without live rows have total 0: out is 0.
    top, total, out = (x[:U] for x in softmax)
    divisor = jnp.maximum(total, 1e-30)
    lse = jnp.where(total > 0, top + jnp.log(divisor), NEG_INF)

    def by_query(x: jax.Array) -> jax.Array:
        """[U, T · G, …] to [B, T, N, …]."""
        x = jnp.moveaxis(x.reshape(B, K, T, G, *x.shape[2:]), 1, 2)
        return x.reshape(B, T, N, *x.shape[4:])

    return by_query(out / divisor[..., None]), by_query(lse)


def attend_dense(
    q: Float[Array, "B N H"],
    k: Entries,
    v: Entries,
    lengths: Int[Array, " B"],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Float[Array, "B N Y"], Float[Array, "B N"]]:
    """Attention over a dense cache as over a pool with a segment for each head: of its rows only
    the live ones are read, and unpacked a tile at a time.

    Args:
        q, k, v, lengths, scale, window, softcap: as in `gqa_decode`.

    Returns:
        out and lse, fp32.
    """
    B, K, S = k.shape[:3]
    k_pool, v_pool = jax.tree.map(lambda x: x.reshape(B, K * S, *x.shape[3:]), (k, v))
    before = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    starts = before[:, None] + jnp.arange(K, dtype=jnp.int32)[None] * S
    live = jnp.broadcast_to((lengths - before)[:, None], starts.shape)
    out, lse = attend(q[:, None], k_pool, v_pool, Segments(starts, live), live, scale, softcap)
    return out[:, 0], lse[:, 0]


def _tiles(
    segments: Segments, lengths: Int[Array, "B K"], size: tuple[int, int]
) -> Int[Array, "V 5"]:
    """A table of the tiles of U = B · K segments, and of C empty segments after them.

    Every segment gets at least one tile. The C tiles of a turn therefore belong to at most C
    consecutive segments.

    Args:
        size: C and R, tiles of a turn and rows of a tile.

    Returns:
        For each segment: the numbers of its first tile and of the tile after its last, its
        sequence, its first row, and its live rows.
    """
    C, R = size
    count = jnp.maximum(-(-lengths // R), 1).reshape(-1)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    sequences = jnp.arange(lengths.shape[0], dtype=jnp.int32)[:, None]
    sequences = jnp.broadcast_to(sequences, lengths.shape)
    rest = (x.reshape(-1) for x in (sequences, segments.starts, lengths))
    last, never = ends[-1], jnp.iinfo(jnp.int32).max
    # Empty segments end at the largest number: no tile is counted after them (see `_turn`).
    empty = jnp.stack([last, *(jnp.asarray(x, jnp.int32) for x in (never, 0, 0, 0))])
    table = jnp.stack([ends - count, ends, *rest], axis=1)
    return jnp.concatenate([table, jnp.broadcast_to(empty, (C, 5))])


def _turn(
    tiles: jax.Array, first: jax.Array, number: jax.Array, size: tuple[int, int], pool_rows: int
) -> Turn:
    """The C tiles of R rows from `number` on; the first one belongs to segment `first`.

    Args:
        size: C and R.
    """
    # The owner of a tile: how many of the next C segments end at or before it.
    (C, R), near = size, _consecutive(tiles, first, size[0])
    numbers = number + jnp.arange(C + 1, dtype=jnp.int32)
    owner = jnp.sum(near[None, :, 1] <= numbers[:, None], axis=1, dtype=jnp.int32)
    following, owner = first + owner[C], owner[:C]
    number, _, sequence, start, length = near[owner].T
    begin = start + (numbers[:C] - number) * R
    # A tile that would pass the pool's end starts earlier. Its first rows belong to the tile
    # before it and are not live here.
    row = jnp.clip(begin, 0, pool_rows - R)
    each = row[:, None] + jnp.arange(R, dtype=jnp.int32)[None]
    live = (each >= begin[:, None]) & (each < (start + length)[:, None])
    return Turn(first, owner, sequence, row, live, following)


def _update(old: Softmax, turn: Turn, logits: jax.Array, v: Entries, dtype) -> Softmax:
    """Adds the C tiles of a turn, with logits [C, Q, R] and values, to the softmax of C segments.

    Several tiles can belong to one segment: `owned` [segments, tiles] adds them up.
    """
    C, Q, _ = logits.shape
    owned = jnp.arange(C, dtype=jnp.int32)[:, None] == turn.owner[None]
    tops = jnp.where(owned[..., None], jnp.max(logits, axis=-1)[None], NEG_INF)
    top = jnp.maximum(old.top, jnp.max(tops, axis=1))
    # At least NEG_INF / 2, far above masked logits: their weight is 0 even where no row is live.
    shift = jnp.maximum(top, NEG_INF / 2)[turn.owner]
    weights = jnp.exp(logits - shift[..., None])
    shrink, one_hot = jnp.exp(old.top - top), owned.astype(jnp.float32)
    total = old.total * shrink + one_hot @ jnp.sum(weights, axis=-1)
    # The scale of a value multiplies its weight, so that values are never rebuilt in full.
    if isinstance(v, Quantized):
        weights = weights * v.scale[:, None]
    values = plain(v, dtype)
    weights = weights.astype(values.dtype)
    out = jnp.einsum("cqr,cry->cqy", weights, values, preferred_element_type=jnp.float32)
    out = (one_hot @ out.reshape(C, -1)).reshape(C, Q, -1)
    return Softmax(top, total, old.out * shrink[..., None] + out)


def _logits(queries: Float[Array, "C Q H"], keys: Entries) -> Float[Array, "C Q R"]:
    """Products of the queries and keys of each tile, fp32.

    The order of the operands matters to XLA:CPU, up to a factor of two, and depends on the dtype.
    """
    k = plain(keys, queries.dtype)
    if k.dtype != jnp.float32:
        logits = jnp.einsum("cqh,crh->cqr", queries, k, preferred_element_type=jnp.float32)
    else:
        # Keys on the left. The barrier keeps XLA:CPU from exchanging the operands again: it would
        # first copy the transposed fp32 keys, which costs several times the product.
        products = jnp.einsum("crh,cqh->crq", k, queries)
        logits = jnp.swapaxes(jax.lax.optimization_barrier(products), 1, 2)
    return logits * keys.scale[:, None] if isinstance(keys, Quantized) else logits


def _cut(tree, turn: Turn):
    """[C, R, …] a turn's tiles of the arrays [B, P, …] in a tree."""
    rows = turn.live.shape[1]

    def cut(x: jax.Array) -> jax.Array:
        # With rows and their entries as one axis XLA:CPU copies a tile in one piece.
        width = math.prod(x.shape[2:])
        flat = x.reshape(x.shape[0], -1)
        tiles = [
            jax.lax.dynamic_slice(flat, at, (1, rows * width), allow_negative_indices=False)
            for at in zip(turn.sequence, turn.row * width, strict=True)
        ]
        return jnp.concatenate(tiles).reshape(-1, rows, *x.shape[2:])

    return jax.tree.map(cut, tree)


def _cut_live(tree, turn: Turn):
    """Like `_cut`, with zeros in dead rows, because they may hold NaN and 0 · NaN is NaN."""

    def cut(x: jax.Array) -> jax.Array:
        live = turn.live.reshape(*turn.live.shape, *(1,) * (x.ndim - 2))
        return jnp.where(live, _slices(x, turn, axis=1), jnp.zeros((), x.dtype))

    return jax.tree.map(cut, tree)


def _shown(live: Bool[Array, "B T P"] | Newer, turn: Turn, queries: int) -> Bool[Array, "C Q R"]:
    """Which rows of a turn's tiles the Q = T · G queries of each tile may see."""
    if isinstance(live, Newer):
        than = live.than[turn.sequence]
        shown = _cut(live.positions, turn)[:, None] > than[:, :, None]
        return jnp.repeat(shown, queries // than.shape[1], axis=1)
    return jnp.repeat(_slices(live, turn, axis=2), queries // live.shape[1], axis=1)


def _slices(x: jax.Array, turn: Turn, axis: int) -> jax.Array:
    """[C, …] a turn's tiles of an array [B, …]; `axis` is the axis of the pool's rows."""
    zero, size = jnp.zeros((), jnp.int32), [1, *x.shape[1:]]
    size[axis] = turn.live.shape[1]
    tiles = []
    for sequence, row in zip(turn.sequence, turn.row, strict=True):
        start = [sequence, *[zero] * (x.ndim - 1)]
        start[axis] = row
        tiles.append(jax.lax.dynamic_slice(x, start, size, allow_negative_indices=False))
    return jnp.concatenate(tiles)


def _nothing(segments: int, queries: int, width: int) -> Softmax:
    """The softmax before the first row."""
    shape = segments, queries
    top, zeros = jnp.full(shape, NEG_INF, jnp.float32), jnp.zeros(shape, jnp.float32)
    return Softmax(top, zeros, jnp.zeros((*shape, width), jnp.float32))


def _consecutive(tree, first: jax.Array, count: int):
    """The elements first … first + count − 1 of the arrays in a tree."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
    return jax.tree.map(lambda x: cut(x, first, count), tree)


def _replace(tree, new, first: jax.Array):
    """The arrays in a tree with `new` in place of the elements from `first` on."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, allow_negative_indices=False)
    return jax.tree.map(lambda x, y: write(x, y, first, 0), tree, new)
