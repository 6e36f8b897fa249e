"""What the GPU kernel knows at compile time: tiles, shared memory, and each warpgroup's columns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE
from pallas_kernels.plan import Operands, WorkList, count_pieces

COLUMNS = 256
"""Columns of the widest values that one warpgroup accumulates."""
LEAD_COLUMNS = 192
"""Its columns of wider values: the weights, which it computes, need registers too."""
CHUNK = 64
"""Columns of values that one product reads."""


class Settings(NamedTuple):
    """Settings of one kernel.

    Attributes:
        shares: blocks of threads, each of which takes an equal share of the work list.
        stages: pieces that are under way to shared memory.
        group: queries of a segment, a multiple of 8, at most 64.
        segments: consecutive segments that lie in the same array of rows.
        scale, softcap: of the logits.
    """

    shares: int
    stages: int
    group: int
    segments: int
    scale: float
    softcap: float | None


class Scratch(NamedTuple):
    """Shared memory and barriers.

    Attributes:
        queries: a tuple of [64, X].
        ring: what is read of the entries and their rows, [stages, 64, ·] each.
        staged: keys and values in the queries' dtype where the entries have 8 bits; else None.
        weights: [64, 64], what the first warpgroup computes.
        shrink: [64], which it hands to the others with them; None where there are none.
        filled, free: barriers of the ring's stages.
        asked: barrier of the queries.
        given, taken: barriers of what is handed to other warpgroups.
    """

    queries: Any
    ring: Operands
    staged: Operands | None
    weights: Any
    filled: Any
    free: Any
    asked: Any
    shrink: Any = None
    given: Any = None
    taken: Any = None


def parts(width: int) -> list[slice]:
    """The columns of the values that each computing warpgroup accumulates."""
    if width <= COLUMNS:
        return [slice(0, width)]
    return [slice(0, LEAD_COLUMNS), slice(LEAD_COLUMNS, width)]


def chunks(columns: slice) -> list[slice]:
    """A warpgroup's columns, as many at a time as one product reads."""
    starts = range(columns.start, columns.stop, CHUNK)
    return [slice(c, min(c + CHUNK, columns.stop)) for c in starts]


def scratch(x: Operands, stages: int) -> Scratch:
    """The kernel's shared memory."""
    dtype = x.queries[0].dtype
    waiting = len(parts(x.values.shape[2])) - 1

    def ring(entry: Any) -> Any:
        return _tile(stages, BLOCK, entry.shape[2], dtype=entry.dtype)

    def rows(row: Any) -> Any:
        return None if row is None else plgpu.SMEM((stages, BLOCK), row.dtype)

    def staged(entry: Any) -> Any:
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
        staged=None if x.keys[0].dtype == dtype else laid_out(staged, lambda row: None),
        weights=_tile(ROWS, BLOCK, dtype=dtype, like=x.values.shape[2]),
        filled=barrier(len(x.entries) + len(x.per_row), stages),
        free=barrier(1 + waiting if x.keys[0].dtype == dtype else 1, stages),
        asked=barrier(len(x.queries)),
    )
    if not waiting:
        return shared
    shrink = plgpu.SMEM((ROWS,), jnp.float32)
    return shared._replace(shrink=shrink, given=barrier(1), taken=barrier(waiting))


def _tile(*shape: int, dtype: Any, like: int | None = None) -> Any:
    """Shared memory in the layout that tensor cores read.

    Args:
        like: both sides of a product have the same swizzle: the width that decides; default that
            of `shape`.
    """
    size = jnp.dtype(dtype).itemsize
    width = shape[-1] if like is None else like
    swizzle = min(plgpu.find_swizzle(width * 8 * size), CHUNK * size)
    transforms = plgpu.TilingTransform((TILE, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Stretch(NamedTuple):
    """The pieces of one segment in one share, in scalars.

    Attributes:
        owner: the segment.
        first, last: numbers of its first piece and of the one after the last.
        begin: number of the share's first piece.
        slot: where its result goes.
    """

    owner: jax.Array
    first: jax.Array
    last: jax.Array
    begin: jax.Array
    slot: jax.Array


def for_each_segment(work: WorkList, run: Callable[[Stretch], None]) -> None:
    """Calls `run` for the segments that have pieces in this share; `work` holds refs."""
    share = jax.lax.axis_index("share")
    begin = share * work.bounds[1]
    end = jnp.minimum(begin + work.bounds[1], work.bounds[0])

    def visit(owner, _):
        first = work.firsts[owner]
        pieces = count_pieces(work.begins[owner], work.ends[owner], BLOCK)
        last = jnp.minimum(first + pieces, end)
        stretch = Stretch(owner, jnp.maximum(first, begin), last, begin, share + owner)
        pl.when(stretch.last > stretch.first)(lambda: run(stretch))

    jax.lax.fori_loop(work.owners[share], work.owners[share + 1] + 1, visit, None)


def for_each_piece(stretch: Stretch, stages: int, run: Callable, state: Any) -> Any:
    """state = run(piece, turn, stage, state) for each; `turn` counts the share's pieces."""

    def step(piece, state):
        turn = piece - stretch.begin
        return run(piece, turn, turn % stages, state)

    return jax.lax.fori_loop(stretch.first, stretch.last, step, state)


def first_row(work: WorkList, stretch: Stretch, piece: jax.Array) -> jax.Array:
    """First row of a piece, counted from the start of its segment."""
    owner = stretch.owner
    return (piece - work.firsts[owner] + work.begins[owner] // BLOCK) * BLOCK


def live_rows(work: WorkList, stretch: Stretch, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The piece's first live row and the one after its last."""
    row = first_row(work, stretch, piece)
    return work.begins[stretch.owner] - row, work.ends[stretch.owner] - row
