"""What the computing warpgroups do with the blocks in shared memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE
from pallas_kernels.gpu.scratch import Scratch, Settings, Stretch, chunks, for_each_piece, live_rows
from pallas_kernels.plan import Operands, WorkList
from pallas_kernels.reference import NEG_INF

LOG2E = math.log2(math.e)
MATRIX = plgpu.Layout.WGMMA
COLUMN, ROW = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def lead(
    work: WorkList,
    x: Operands,
    out_ref: Any,
    sums_ref: Any,
    scratch: Scratch,
    settings: Settings,
    columns: slice,
    stretch: Stretch,
) -> None:
    """Computes the weights of a segment's blocks, and the first columns of its output."""
    rows = pl.ds(pl.multiple_of(stretch.owner * settings.group, TILE), ROWS)
    for source, held in zip(x.queries, scratch.queries, strict=True):
        plgpu.copy_gmem_to_smem(source.at[rows], held, scratch.asked)
    plgpu.barrier_wait(scratch.asked)
    than = None if x.than is None else x.than[stretch.owner // settings.segments]

    def step(piece, turn, stage, state):
        acc, top, total = state
        plgpu.barrier_wait(scratch.filled.at[stage])
        if scratch.taken is not None:
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.taken))
        bounds = live_rows(work, stretch, piece)
        _stage(scratch, stage, bounds)
        logits, live = _logits(scratch, stage, settings), _live(scratch, stage, bounds, than)
        logits = jnp.where(live, logits, NEG_INF)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(new_top, logits.shape, (0,)))
        weights = jnp.where(live, weights, 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        _give(scratch, stage, weights, live, shrink)
        if scratch.staged is not None:
            plgpu.barrier_arrive(scratch.free.at[stage])
        acc = _weigh(scratch, stage, columns, shrink, acc, bounds)
        if scratch.staged is None:
            plgpu.barrier_arrive(scratch.free.at[stage])
        return acc, new_top, total

    start = _zeros(columns), _full(NEG_INF, (ROWS,), COLUMN), _full(0.0, (ROWS,), COLUMN)
    acc, top, total = for_each_piece(stretch, settings.stages, step, start)
    _store(out_ref, stretch.slot, columns, acc)
    sums_ref.at[0, stretch.slot][...] = top
    sums_ref.at[1, stretch.slot][...] = total


def follow(
    work: WorkList,
    x: Operands,
    out_ref: Any,
    sums_ref: Any,
    scratch: Scratch,
    settings: Settings,
    columns: slice,
    stretch: Stretch,
) -> None:
    """Computes other columns of a segment's output, with the weights that it is given."""

    def step(piece, turn, stage, acc):
        plgpu.barrier_wait(scratch.filled.at[stage])
        plgpu.barrier_wait(scratch.given)
        shrink = plgpu.layout_cast(scratch.shrink[...], COLUMN)
        acc = _weigh(scratch, stage, columns, shrink, acc, live_rows(work, stretch, piece))
        plgpu.barrier_arrive(scratch.taken)
        if scratch.staged is None:
            plgpu.barrier_arrive(scratch.free.at[stage])
        return acc

    acc = for_each_piece(stretch, settings.stages, step, _zeros(columns))
    _store(out_ref, stretch.slot, columns, acc)


def _stage(scratch: Scratch, stage: jax.Array, bounds: tuple) -> None:
    """Entries of 8 bits in the dtype of the products, without their scales; dead rows are 0."""
    if scratch.staged is None:
        return
    for ring, staged in zip(scratch.ring.entries, scratch.staged.entries, strict=True):
        for c in chunks(slice(0, staged.shape[1])):
            tile = plgpu.layout_cast(ring.at[stage, :, c][...], MATRIX)
            # Of 8-bit floats there is no other conversion than to float32.
            wide = tile.astype(jnp.float32) if jnp.issubdtype(tile.dtype, jnp.floating) else tile
            staged.at[:, c][...] = _rows_or_zero(wide.astype(staged.dtype), bounds)
    plgpu.commit_smem()


def _rows_or_zero(tile: jax.Array, bounds: tuple) -> jax.Array:
    row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=MATRIX)
    live = (row >= bounds[0]) & (row < bounds[1])
    return jnp.where(live, tile, jnp.zeros((), tile.dtype))


def _logits(scratch: Scratch, stage: jax.Array, settings: Settings) -> jax.Array:
    """[64, 64] fp32, in units of log 2."""
    ring, staged = scratch.ring, scratch.staged
    keys = [k.at[stage] for k in ring.keys] if staged is None else staged.keys
    pairs = list(zip(scratch.queries, keys, strict=True))
    if ring.key_scales[0] is None:
        logits = _product(pairs)
    else:  # each kind of keys has scales of its own
        first, *rest = (
            _product([pair]) * _of_rows(scales, stage)
            for pair, scales in zip(pairs, ring.key_scales, strict=True)
        )
        logits = sum(rest, start=first)
    logits = logits * settings.scale
    if settings.softcap is not None:
        logits = settings.softcap * jnp.tanh(logits / settings.softcap)
    return logits * LOG2E


def _product(pairs: list[tuple[Any, Any]]) -> jax.Array:
    """Σ queries · keysᵀ, [64, 64] fp32."""

    def run(acc):
        for q, k in pairs:
            plgpu.wgmma(acc, q, k.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def _of_rows(ring: Any, stage: jax.Array) -> jax.Array:
    """What belongs to the block's rows, spread over the queries: [64, 64]."""
    return jax.lax.broadcast_in_dim(
        plgpu.layout_cast(ring.at[stage][...], ROW), (ROWS, BLOCK), (1,)
    )


def _live(scratch: Scratch, stage: jax.Array, bounds: tuple, than: jax.Array | None) -> jax.Array:
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=MATRIX)
    live = (row >= bounds[0]) & (row < bounds[1])
    return live if than is None else live & (_of_rows(scratch.ring.positions, stage) > than)


def _give(scratch: Scratch, stage: jax.Array, weights: Any, live: Any, shrink: Any) -> None:
    """Puts weights into shared memory, where products and the other warpgroups read them."""
    if scratch.ring.value_scale is not None:
        weights = jnp.where(live, weights * _of_rows(scratch.ring.value_scale, stage), 0.0)
    scratch.weights[...] = weights.astype(scratch.weights.dtype)
    if scratch.shrink is not None:
        scratch.shrink[...] = shrink
    plgpu.commit_smem()
    if scratch.given is not None:
        plgpu.barrier_arrive(scratch.given)


def _weigh(
    scratch: Scratch, stage: jax.Array, columns: slice, shrink: Any, acc: tuple, bounds: tuple
) -> tuple[jax.Array, ...]:
    """acc · shrink + weights · values; dead rows are zeroed first, for 0 · NaN is NaN."""
    if scratch.staged is not None:
        values = scratch.staged.values
    else:
        values = scratch.ring.values.at[stage]

        @pl.when((bounds[0] > 0) | (bounds[1] < BLOCK))
        def _():
            for c in chunks(columns):
                tile = values.at[:, c]
                tile[...] = _rows_or_zero(plgpu.layout_cast(tile[...], MATRIX), bounds)
            plgpu.commit_smem()

    def product(part, acc):
        plgpu.wgmma(acc, scratch.weights, part)
        return acc[...]

    sums = []
    for c, old in zip(chunks(columns), acc, strict=True):
        run = functools.partial(product, values.at[:, c])
        new = pl.run_scoped(run, plgpu.ACC(old.shape, jnp.float32))
        sums.append(old * jax.lax.broadcast_in_dim(shrink, old.shape, (0,)) + new)
    return tuple(sums)


def _full(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _zeros(columns: slice) -> tuple[jax.Array, ...]:
    return tuple(_full(0.0, (ROWS, c.stop - c.start), MATRIX) for c in chunks(columns))


def _store(out_ref: Any, slot: jax.Array, columns: slice, acc: tuple) -> None:
    for c, part in zip(chunks(columns), acc, strict=True):
        out_ref.at[slot, :, c][...] = part
