"""What the warpgroups of the GPU kernel share: the walk over the work list, and shared memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE
from pallas_kernels.plan import Operands, WorkList, count_pieces

COLUMNS = 256
"""The widest values, in columns, that a single warpgroup accumulates."""
LEAD_COLUMNS = 192
"""Columns of wider values that the leader accumulates; the weights take part of its registers."""
CHUNK = 64
"""Columns of values that one product reads."""


class Settings(NamedTuple):
    """Settings of one kernel, known at compile time.

    Attributes:
        shares: thread blocks, each of which takes an equal share of the work list.
        stages: pieces that the ring in shared memory holds.
        group: queries of a segment, a multiple of 8, at most 64.
        segments: consecutive segments that are stored in the same array of rows.
        scale, softcap: of the logits.
    """

    shares: int
    stages: int
    group: int
    segments: int
    scale: float
    softcap: float | None


class Stretch(NamedTuple):
    """The consecutive pieces of one segment in one share, in scalars.

    Attributes:
        owner: the segment.
        first, last: numbers of the first piece and of the one after the last, in the work list.
        begin: number of the share's first piece.
        slot: where the stretch's partial result is stored.
    """

    owner: jax.Array
    first: jax.Array
    last: jax.Array
    begin: jax.Array
    slot: jax.Array


def for_each_segment(work: WorkList, run: Callable[[Stretch], None]) -> None:
    """Calls `run` for every segment that has pieces in this share; `work` holds refs.

    Every warpgroup walks the list by itself, so that all of them agree on the order of the pieces
    without exchanging anything.
    """
    share = jax.lax.axis_index("share")
    begin = share * work.bounds[1]
    end = jnp.minimum(begin + work.bounds[1], work.bounds[0])

    def visit(owner, _):
        first = work.firsts[owner]
        pieces = count_pieces(work.begins[owner], work.ends[owner], BLOCK)
        # A segment can begin in an earlier share and end in a later one.
        last = jnp.minimum(first + pieces, end)
        stretch = Stretch(owner, jnp.maximum(first, begin), last, begin, share + owner)
        pl.when(stretch.last > stretch.first)(lambda: run(stretch))

    # owners[share] has the share's first piece, owners[share + 1] the first piece of the next share
    # and possibly the last piece of this one.
    jax.lax.fori_loop(work.owners[share], work.owners[share + 1] + 1, visit, None)


def for_each_piece(stretch: Stretch, stages: int, run: Callable, state: Any) -> Any:
    """Folds state = run(piece, turn, stage, state) over the pieces of a stretch.

    `turn` counts the pieces of the whole share, so that the ring continues over segments: while the
    last blocks of one segment are computed, the first ones of the next are loaded.
    """

    def step(piece, state):
        turn = piece - stretch.begin
        return run(piece, turn, turn % stages, state)

    return jax.lax.fori_loop(stretch.first, stretch.last, step, state)


def first_row(work: WorkList, stretch: Stretch, piece: jax.Array) -> jax.Array:
    """First row of a piece, counted from the start of its segment."""
    owner = stretch.owner
    return (piece - work.firsts[owner] + work.begins[owner] // BLOCK) * BLOCK


def live_rows(work: WorkList, stretch: Stretch, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The piece's first live row and the one after its last, counted from the piece's first row.

    Where the piece is live from end to end the pair is at most 0 and at least `BLOCK`.
    """
    row = first_row(work, stretch, piece)
    return work.begins[stretch.owner] - row, work.ends[stretch.owner] - row


class Scratch(NamedTuple):
    """Shared memory and barriers of one thread block; see `gpu.compute` for who waits for whom.

    Attributes:
        queries: a tuple of [64, X].
        ring: the blocks of entries, and of the numbers of their rows, [stages, 64, ·] each.
        widened: keys and values in the queries' dtype where the entries have 8 bits; else None.
        weights: [64, 64], the softmax weights of a block.
        filled, freed: barriers for each stage: the copies have arrived; the stage may be reused.
        queries_filled: barrier: the queries have arrived.
        shrink: [64], the factors of the accumulators so far; None without followers.
        weights_ready, weights_read: barriers of `weights` and `shrink`; None without followers.
    """

    queries: Any
    ring: Operands
    widened: Operands | None
    weights: Any
    filled: Any
    freed: Any
    queries_filled: Any
    shrink: Any = None
    weights_ready: Any = None
    weights_read: Any = None


def parts(width: int) -> list[slice]:
    """The columns of values of this width that each computing warpgroup accumulates."""
    if width <= COLUMNS:
        return [slice(0, width)]
    return [slice(0, LEAD_COLUMNS), slice(LEAD_COLUMNS, width)]


def chunks(columns: slice) -> list[slice]:
    """A warpgroup's columns in chunks of what one product reads."""
    starts = range(columns.start, columns.stop, CHUNK)
    return [slice(c, min(c + CHUNK, columns.stop)) for c in starts]


def scratch(x: Operands, stages: int) -> Scratch:
    """The shared memory and barriers for operands of these shapes and dtypes."""
    dtype = x.queries[0].dtype
    quantized = x.keys[0].dtype != dtype
    followers = len(parts(x.values.shape[2])) - 1

    def ring(entry: Any) -> Any:
        return _tile(stages, BLOCK, entry.shape[2], dtype=entry.dtype)

    def rows(row: Any) -> Any:
        return None if row is None else plgpu.SMEM((stages, BLOCK), row.dtype)

    def wide(entry: Any) -> Any:
        return _tile(BLOCK, entry.shape[2], dtype=dtype)

    def barrier(arrivals: int, count: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def laid_out(entry: Any, row: Any) -> Operands:
        return Operands(
            queries=(),
            keys=tuple(entry(k) for k in x.keys),
            own_values=None if x.own_values is None else entry(x.own_values),
            key_scales=tuple(row(k) for k in x.key_scales),
            own_value_scale=None if x.own_value_scale is None else row(x.own_value_scale),
            positions=None if x.positions is None else row(x.positions),
            than=None,
        )

    shared = Scratch(
        queries=tuple(_tile(ROWS, q.shape[1], dtype=dtype) for q in x.queries),
        ring=laid_out(ring, rows),
        widened=laid_out(wide, lambda row: None) if quantized else None,
        weights=_tile(ROWS, BLOCK, dtype=dtype, like=x.values.shape[2]),
        # Every copy arrives once.
        filled=barrier(len(x.entries) + len(x.per_row), stages),
        # Followers read the ring, and free it, only where nothing is widened.
        freed=barrier(1 if quantized else 1 + followers, stages),
        queries_filled=barrier(len(x.queries)),
    )
    if not followers:
        return shared
    shrink = plgpu.SMEM((ROWS,), jnp.float32)
    handed_over = {"weights_ready": barrier(1), "weights_read": barrier(followers)}
    return shared._replace(shrink=shrink, **handed_over)


def _tile(*shape: int, dtype: Any, like: int | None = None) -> Any:
    """Shared memory in the swizzled layout that tensor cores read.

    Args:
        like: width that decides on the swizzle, which both sides of a product must have in common;
            default: the last number of `shape`.
    """
    # At most CHUNK columns: products read that many.
    size = jnp.dtype(dtype).itemsize
    width = shape[-1] if like is None else like
    swizzle = min(plgpu.find_swizzle(width * 8 * size), CHUNK * size)
    transforms = plgpu.TilingTransform((TILE, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
