"""What the GPU kernel knows at compile time: tiles, shared memory, and each warpgroup's columns."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import TILE
from pallas_kernels.gpu.shared_memory import BLOCK, ROWS, entries_of, rows_of
from pallas_kernels.operands import Operands

COLUMNS = 256
"""Columns of the widest values that one warpgroup accumulates."""
LEAD_COLUMNS = 192
"""Its columns of wider values: the weights, which it computes, need registers too."""
CHUNK = 64
"""Columns of values that one product reads."""


class Plan(NamedTuple):
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
    waiting = len(parts(x.weighed.shape[2])) - 1

    def ring(entry: Any) -> Any:
        return _tile(stages, BLOCK, entry.shape[2], dtype=entry.dtype)

    def rows(row: Any) -> Any:
        return None if row is None else plgpu.SMEM((stages, BLOCK), jnp.float32)

    def staged(entry: Any) -> Any:
        return _tile(BLOCK, entry.shape[2], dtype=dtype)

    def barrier(arrivals: int, count: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def laid_out(entry: Any, row: Any) -> Operands:
        return Operands(
            queries=(),
            keys=tuple(entry(k) for k in x.keys),
            values=None if x.values is None else entry(x.values),
            key_scales=tuple(row(k) for k in x.key_scales),
            value_scale=None if x.value_scale is None else row(x.value_scale),
            seen=None if x.seen is None else row(x.seen),
        )

    plan = Scratch(
        queries=tuple(_tile(ROWS, q.shape[1], dtype=dtype) for q in x.queries),
        ring=laid_out(ring, rows),
        staged=None if x.keys[0].dtype == dtype else laid_out(staged, lambda row: None),
        weights=_tile(ROWS, BLOCK, dtype=dtype, like=x.weighed.shape[2]),
        filled=barrier(len(entries_of(x)) + len(rows_of(x)), stages),
        free=barrier(1 + waiting if x.keys[0].dtype == dtype else 1, stages),
        asked=barrier(len(x.queries)),
    )
    if not waiting:
        return plan
    shrink = plgpu.SMEM((ROWS,), jnp.float32)
    return plan._replace(shrink=shrink, given=barrier(1), taken=barrier(waiting))


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
