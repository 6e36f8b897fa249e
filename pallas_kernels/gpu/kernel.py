"""The Mosaic GPU kernel that the three operations share, and the merge of its partial results.

Each thread block works off an equal share of the flat work list (`pallas_kernels.plan`). Its last
warpgroup, the loader, streams keys and values through a ring in shared memory; the others compute.
The queries of a segment fill the 64 rows of a tensor core product, however few they are. Values
wider than 256 columns need more registers than a warpgroup has (64 × 512 fp32), so two warpgroups
accumulate a part of the columns each: the leader computes the softmax weights, and the follower
gets them through shared memory.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.entries import NEG_INF
from pallas_kernels.gpu.compute import follow, lead
from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE
from pallas_kernels.gpu.scratch import (
    Scratch,
    Settings,
    Stretch,
    first_row,
    for_each_piece,
    for_each_segment,
    parts,
    scratch,
)
from pallas_kernels.plan import Operands, WorkList, count_pieces


def attend(x: Operands, work: WorkList, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each segment's queries over its live rows.

    Args:
        x: queries [U · group, X], entries [A, rows, ·], numbers of rows [A, rows], for U segments
            in A arrays.
        work: the pieces of `BLOCK` rows.

    Returns:
        out [U, group, Y] and lse [U, group] fp32; 0 and −1e30 for segments without live rows.
    """
    # One slot for each pair of a share and a segment with pieces in it; see `merge_slots`.
    slots, width = settings.shares + work.ends.shape[0], x.values.shape[2]
    columns = parts(width)
    kernel = plgpu.kernel(
        functools.partial(_kernel, settings=settings, columns=columns),
        out_type=[
            jax.ShapeDtypeStruct((slots, ROWS, width), jnp.float32),
            jax.ShapeDtypeStruct((2, slots, ROWS), jnp.float32),
        ],
        scratch_types=[scratch(x, settings.stages)],
        grid=(settings.shares,),
        grid_names=("share",),
        num_threads=len(columns) + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    out, sums = kernel(work, x)
    return merge_slots(out, sums, work, settings)


def _kernel(work, x, out_ref, sums_ref, scratch, *, settings: Settings, columns: list[slice]):
    """One thread block; every warpgroup takes its own branch."""
    warpgroup = jax.lax.axis_index("wg")

    # Copies need few registers. The loader gives up its own so that the others get 232 each.
    @pl.when(warpgroup == len(columns))
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for_each_segment(work, functools.partial(_load, work, x, scratch, settings))

    for index, part in enumerate(columns):

        @pl.when(warpgroup == index)
        def _(index=index, part=part):
            plgpu.set_max_registers(232, action="increase")
            compute = lead if index == 0 else follow
            run = functools.partial(compute, work, x, out_ref, sums_ref, scratch, settings, part)
            for_each_segment(work, run)


def _load(
    work: WorkList, x: Operands, scratch: Scratch, settings: Settings, stretch: Stretch
) -> None:
    """Streams the blocks of a stretch into the ring."""
    array = stretch.owner // settings.segments
    sources = [*x.entries, *x.per_row]
    rings = [*scratch.ring.entries, *scratch.ring.per_row]

    def load(piece, turn, stage, _):
        row = work.starts[stretch.owner] + first_row(work, stretch, piece)
        at = array, pl.ds(pl.multiple_of(row, TILE), BLOCK)
        # In the first round every stage is free, and nobody arrives at `freed`.
        pl.when(turn >= settings.stages)(lambda: plgpu.barrier_wait(scratch.freed.at[stage]))
        for source, ring in zip(sources, rings, strict=True):
            plgpu.copy_gmem_to_smem(source.at[at], ring.at[stage], scratch.filled.at[stage])

    for_each_piece(stretch, settings.stages, load, None)


def merge_slots(
    out: Float[Array, "slots R Y"],
    sums: Float[Array, "2 slots R"],
    work: WorkList,
    settings: Settings,
) -> tuple[Float[Array, "U G Y"], Float[Array, "U G"]]:
    """Merges the partial results of each segment.

    The result of share s for segment u is in slot s + u. No two results have the same slot: from
    one stretch of the list to the next, s or u grows, or both do.

    Args:
        out: sums of weights · values; slots that no stretch wrote hold arbitrary numbers.
        sums: the largest logit in units of log 2, and the sum of the weights.

    Returns:
        out [U, group, Y] and lse [U, group], fp32.
    """
    # The segment that wrote each slot, −1 for slots that nobody wrote: segment u has the slots from
    # the share of its first piece + u to the share of its last piece + u.
    U, slots = work.ends.shape[0], out.shape[0]
    pieces = count_pieces(work.begins, work.ends, BLOCK)
    segment = jnp.arange(U, dtype=jnp.int32)
    first = segment + work.firsts // work.bounds[1]
    last = jnp.where(pieces > 0, segment + (work.firsts + pieces - 1) // work.bounds[1], -1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    inside = (first[:, None] <= slot[None]) & (slot[None] <= last[:, None])
    owner = jnp.max(jnp.where(inside, segment[:, None], -1), axis=0)
    written = owner >= 0

    # The kernel stores 64 rows, of which the first `group` are queries.
    group = slice(0, settings.group)
    out = jnp.where(written[:, None, None], out[:, group], 0.0)
    top = jnp.where(written[:, None], sums[0, :, group], NEG_INF)
    total = jnp.where(written[:, None], sums[1, :, group], 0.0)

    # A softmax over the slots of each segment: rescale to the highest logit, add, divide. Slots
    # that nobody wrote go to segment U, which the sums drop.
    owner = jnp.where(written, owner, U)
    highest = jnp.maximum(jax.ops.segment_max(top, owner, U), NEG_INF)
    share = jnp.exp2(top - jnp.take(highest, jnp.minimum(owner, U - 1), axis=0))
    share = jnp.where(written[:, None], share, 0.0)
    total = jax.ops.segment_sum(total * share, owner, U)
    divisor = jnp.maximum(total, 1e-30)
    out = jax.ops.segment_sum(out * share[..., None], owner, U) / divisor[..., None]
    lse = jnp.where(total > 0, (highest + jnp.log2(divisor)) * math.log(2), NEG_INF)
    return out, lse
