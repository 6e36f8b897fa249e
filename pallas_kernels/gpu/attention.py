"""One Mosaic GPU kernel over a flat work list, which the three operations share.

Each block of threads works off an equal share of the list. One warpgroup streams keys and values
through a ring in shared memory, the others compute. The queries of a segment fill the 64 rows of
a tensor core product (what further rows compute is dropped). Of values wider than 256 columns
each computing warpgroup accumulates a part: 64 × 512 fp32 are more than one's registers; the
first computes the weights and hands them to the others through shared memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.compute import follow, lead
from pallas_kernels.gpu.merge import merge_slots
from pallas_kernels.gpu.plan import (
    BLOCK,
    ROWS,
    TILE,
    Plan,
    Scratch,
    entries_of,
    parts,
    rows_of,
    scratch,
)
from pallas_kernels.gpu.stretches import Stretch, first_row, for_each_piece, for_each_segment
from pallas_kernels.operands import Operands
from pallas_kernels.plan import WorkList


def attend(x: Operands, work: WorkList, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each segment's queries over its live rows.

    Args:
        x: queries [U · group, X], entries [A, rows, ·], what belongs to rows [A, rows].

    Returns:
        out [U, group, Y] and lse [U, group] fp32; 0 and −1e30 for segments without live rows.
    """
    slots, width = plan.shares + work.ends.shape[0], x.weighed.shape[2]
    columns = parts(width)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, columns=columns),
        out_type=[
            jax.ShapeDtypeStruct((slots, ROWS, width), jnp.float32),
            jax.ShapeDtypeStruct((2, slots, ROWS), jnp.float32),
        ],
        scratch_types=[scratch(x, plan.stages)],
        grid=(plan.shares,),
        grid_names=("share",),
        num_threads=len(columns) + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
    out, sums = kernel(work, x)
    return merge_slots(out, sums, work, plan)


def _kernel(work, x, out_ref, sums_ref, scratch, *, plan: Plan, columns: list[slice]):
    warpgroup = jax.lax.axis_index("wg")

    @pl.when(warpgroup == len(columns))
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for_each_segment(work, functools.partial(_load, work, x, scratch, plan))

    for index, part in enumerate(columns):

        @pl.when(warpgroup == index)
        def _(index=index, part=part):
            plgpu.set_max_registers(232, action="increase")
            compute = lead if index == 0 else follow
            run = functools.partial(compute, work, x, out_ref, sums_ref, scratch, plan, part)
            for_each_segment(work, run)


def _load(work: WorkList, x: Operands, scratch: Scratch, plan: Plan, stretch: Stretch) -> None:
    """Streams the blocks of a segment into the ring."""
    array = stretch.owner // plan.segments
    sources = [*entries_of(x), *rows_of(x)]
    rings = [*entries_of(scratch.ring), *rows_of(scratch.ring)]

    def load(piece, turn, stage, _):
        row = work.starts[stretch.owner] + first_row(work, stretch, piece)
        at = array, pl.ds(pl.multiple_of(row, TILE), BLOCK)
        pl.when(turn >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[stage]))
        for source, ring in zip(sources, rings, strict=True):
            plgpu.copy_gmem_to_smem(source.at[at], ring.at[stage], scratch.filled.at[stage])

    for_each_piece(stretch, plan.stages, load, None)
