"""What the computing warpgroups of the GPU kernel do with the blocks in shared memory.

For one block, with two computing warpgroups (values wider than 256 columns):

    | warpgroup | waits for             | does              | then arrives at       |
    |-----------|-----------------------|-------------------|-----------------------|
    | loader    | freed                 | copies            | filled                |
    | leader    | filled, weights_read  | q·kᵀ, weights     | weights_ready         |
    |           |                       | its columns       | freed                 |
    | follower  | filled, weights_ready | the other columns | weights_read, freed   |

The leader waits for `weights_read` because the followers read the previous block's weights from the
shared memory that it overwrites next. With one computing warpgroup there are no followers, and only
`filled` and `freed` remain.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.entries import NEG_INF
from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE
from pallas_kernels.gpu.scratch import Scratch, Settings, Stretch, chunks, for_each_piece, live_rows
from pallas_kernels.plan import Operands, WorkList

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
    """Computes the softmax weights of a stretch, and `columns` of its output.

    Writes the sum of weights · values to `out_ref` [slots, 64, Y], and the largest logit (in units
    of log 2) and the sum of the weights to `sums_ref` [2, slots, 64].
    """
    # 64 rows are copied whatever the group's size: the products need 64, and the results of the
    # rows beyond the group are dropped in `merge_slots`.
    rows = pl.ds(pl.multiple_of(stretch.owner * settings.group, TILE), ROWS)
    for source, target in zip(x.queries, scratch.queries, strict=True):
        plgpu.copy_gmem_to_smem(source.at[rows], target, scratch.queries_filled)
    plgpu.barrier_wait(scratch.queries_filled)
    than = None if x.than is None else x.than[stretch.owner // settings.segments]

    def step(piece, turn, stage, state):
        acc, top, total = state
        plgpu.barrier_wait(scratch.filled.at[stage])
        # Before `_widen`: the followers read the widened values of the previous block, too.
        if scratch.weights_read is not None:
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.weights_read))
        bounds = live_rows(work, stretch, piece)
        _widen(scratch, stage, bounds)

        # One step of the online softmax (arXiv 2205.14135), in units of log 2: exp2 is an
        # instruction. Weights are masked as well as logits, since a block without a live row has
        # new_top = NEG_INF and exp2(logits - new_top) = 1.
        logits, live = _logits(scratch, stage, settings), _live(scratch, stage, bounds, than)
        logits = jnp.where(live, logits, NEG_INF)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - jax.lax.broadcast_in_dim(new_top, logits.shape, (0,)))
        weights = jnp.where(live, weights, 0.0)
        total = total * shrink + jnp.sum(weights, axis=1)
        _publish(scratch, stage, weights, live, shrink)

        # Nothing reads the ring after `_publish` where the entries were widened: the loader may
        # refill the stage while the product runs. Otherwise the product reads the ring.
        if scratch.widened is not None:
            plgpu.barrier_arrive(scratch.freed.at[stage])
        acc = _accumulate(scratch, stage, columns, shrink, acc, bounds)
        if scratch.widened is None:
            plgpu.barrier_arrive(scratch.freed.at[stage])
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
    """Computes further `columns` of a stretch's output, with the weights of `lead`."""

    def step(piece, turn, stage, acc):
        # Widened values are published together with the weights. Waiting for the ring as well would
        # be wrong: the leader alone frees a widened stage, so the loader can get two fills ahead.
        if scratch.widened is None:
            plgpu.barrier_wait(scratch.filled.at[stage])
        plgpu.barrier_wait(scratch.weights_ready)
        shrink = plgpu.layout_cast(scratch.shrink[...], COLUMN)
        bounds = live_rows(work, stretch, piece)
        acc = _accumulate(scratch, stage, columns, shrink, acc, bounds)
        plgpu.barrier_arrive(scratch.weights_read)
        if scratch.widened is None:
            plgpu.barrier_arrive(scratch.freed.at[stage])
        return acc

    acc = for_each_piece(stretch, settings.stages, step, _zeros(columns))
    _store(out_ref, stretch.slot, columns, acc)


def _widen(scratch: Scratch, stage: jax.Array, bounds: tuple) -> None:
    """Copies 8-bit entries to `scratch.widened`, without their scales and with dead rows as 0."""
    if scratch.widened is None:
        return
    for source, target in zip(scratch.ring.entries, scratch.widened.entries, strict=True):
        for c in chunks(slice(0, target.shape[1])):
            tile = plgpu.layout_cast(source.at[stage, :, c][...], MATRIX)
            # Mosaic converts 8-bit floats to float32 only.
            wide = tile.astype(jnp.float32) if jnp.issubdtype(tile.dtype, jnp.floating) else tile
            target.at[:, c][...] = _rows_or_zero(wide.astype(target.dtype), bounds)
    plgpu.commit_smem()


def _rows_or_zero(tile: jax.Array, bounds: tuple) -> jax.Array:
    """The tile with zeros in the rows outside of `bounds`."""
    row = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=MATRIX)
    live = (row >= bounds[0]) & (row < bounds[1])
    return jnp.where(live, tile, jnp.zeros((), tile.dtype))


def _logits(scratch: Scratch, stage: jax.Array, settings: Settings) -> jax.Array:
    """Scaled and soft-capped logits [64 queries, 64 rows], fp32, in units of log 2."""
    ring, widened = scratch.ring, scratch.widened
    keys = [k.at[stage] for k in ring.keys] if widened is None else widened.keys
    pairs = list(zip(scratch.queries, keys, strict=True))
    if ring.key_scales[0] is None:
        logits = _product(pairs)
    else:
        # Latents and rotary keys have different scales: each product is scaled before the sum.
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
    """Σ queries · keysᵀ over the pairs, [64, 64] fp32."""

    def run(acc):
        for q, k in pairs:
            plgpu.wgmma(acc, q, k.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def _of_rows(ring: Any, stage: jax.Array) -> jax.Array:
    """The numbers of a block's rows, repeated for each query: [64, 64]."""
    return jax.lax.broadcast_in_dim(
        plgpu.layout_cast(ring.at[stage][...], ROW), (ROWS, BLOCK), (1,)
    )


def _live(scratch: Scratch, stage: jax.Array, bounds: tuple, than: jax.Array | None) -> jax.Array:
    """Which logits count, [64, 64] bool: rows within `bounds` whose position is above `than`."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=MATRIX)
    live = (row >= bounds[0]) & (row < bounds[1])
    return live if than is None else live & (_of_rows(scratch.ring.positions, stage) > than)


def _publish(scratch: Scratch, stage: jax.Array, weights: Any, live: Any, shrink: Any) -> None:
    """Writes the weights to shared memory, where products and followers read them."""
    # The scale of a value multiplies its weight. Scales of dead rows may be NaN: mask again.
    if scratch.ring.value_scale is not None:
        weights = jnp.where(live, weights * _of_rows(scratch.ring.value_scale, stage), 0.0)
    scratch.weights[...] = weights.astype(scratch.weights.dtype)
    if scratch.shrink is not None:
        scratch.shrink[...] = shrink
    # Products read shared memory through the asynchronous proxy: without this fence they could
    # read the previous weights.
    plgpu.commit_smem()
    if scratch.weights_ready is not None:
        plgpu.barrier_arrive(scratch.weights_ready)


def _accumulate(
    scratch: Scratch, stage: jax.Array, columns: slice, shrink: Any, acc: tuple, bounds: tuple
) -> tuple[jax.Array, ...]:
    """acc · shrink + weights · values, for each chunk of `columns`."""
    if scratch.widened is not None:
        values = scratch.widened.values
    else:
        values = scratch.ring.values.at[stage]

        # Dead rows have weight 0, but they may hold NaN, and 0 · NaN is NaN. Each warpgroup cleans
        # the columns that it reads; blocks without dead rows need no cleaning.
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
    """The accumulator: [64, chunk] fp32 for each chunk of `columns`."""
    return tuple(_full(0.0, (ROWS, c.stop - c.start), MATRIX) for c in chunks(columns))


def _store(out_ref: Any, slot: jax.Array, columns: slice, acc: tuple) -> None:
    """Writes the accumulator to the slot of a stretch."""
    for c, part in zip(chunks(columns), acc, strict=True):
        out_ref.at[slot, :, c][...] = part
