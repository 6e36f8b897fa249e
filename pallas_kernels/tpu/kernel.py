"""The Mosaic kernel for TPUs: an online softmax over a flat work list, for all three operations.

A grid step works on a piece: one block of keys and values, and the queries that read it. The work
list arrives in scalar memory (SMEM) before the kernel starts, and the index maps read it. All
pieces of a segment have the same queries and the same output, which are copied once a segment.
Nothing here asks a device for anything, so the kernel compiles ahead of time.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.entries import NEG_INF, soft_cap
from pallas_kernels.plan import Operands, WorkList, combine
from pallas_kernels.tpu.limits import LANES, padded_rows, row_span


class Piece(NamedTuple):
    """What a grid step reads, in scalars.

    Attributes:
        number: the piece's number in the work list; the last one for steps past the list's end.
        valid: whether the step has a piece.
        owner: the segment.
        block: number of the block within the segment.
        row: first row of the block in the array that holds the segment.
        low, high: the block's first live row and the one after the last, counted from `row`.
    """

    number: jax.Array
    valid: jax.Array
    owner: jax.Array
    block: jax.Array
    row: jax.Array
    low: jax.Array
    high: jax.Array


@dataclass(frozen=True)
class Blocks:
    """Where the pieces of dense caches [U, C, rows, X] are; segment u is array u, from row 0 on.

    Numbers of rows, such as scales, are in arrays [U, C, rows].

    Attributes:
        size: rows of a block.
        heads: C, KV heads that a piece reads together.
    """

    size: int
    heads: int

    def piece(self, share: Any, step: Any, work: WorkList) -> Piece:
        """The piece of a grid step; `work` holds SMEM refs."""
        number = share * work.bounds[1] + step
        # The last share can have more steps than pieces. They name the last piece again, whose
        # blocks are in VMEM already, so that no DMA starts.
        clipped = jnp.maximum(jnp.minimum(number, work.bounds[0] - 1), 0)
        owner = work.owners[clipped]
        block = clipped - work.firsts[owner] + work.begins[owner] // self.size
        begin, start = block * self.size, work.starts[owner]
        row = self.first_row(start + begin)
        low = jnp.maximum(work.begins[owner], begin) + start - row
        high = jnp.minimum(work.ends[owner], begin + self.size) + start - row
        return Piece(clipped, number < work.bounds[0], owner, block, row, low, high)

    def array(self, owner: jax.Array) -> jax.Array:
        """The array that holds a segment."""
        return owner

    def first_row(self, row: jax.Array) -> jax.Array:
        """Where a block that should begin at `row` begins. The last one may pass the array's end:
        Pallas copies the rows that exist."""
        return row

    def spec(self, width: int) -> pl.BlockSpec:
        """The block of [U, C, rows, width] that a piece reads."""

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            return piece.owner, 0, piece.block, 0

        return pl.BlockSpec((1, self.heads, self.size, width), index)

    def row_spec(self) -> pl.BlockSpec:
        """The block of [U, C, rows] that a piece reads."""

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            return piece.owner, 0, piece.block

        return pl.BlockSpec((1, self.heads, self.size), index)

    def read_rows(self, ref: Any, piece: Piece) -> jax.Array:
        """[C, size] the numbers of the piece's rows, from the block of `row_spec`."""
        return ref[0]


@dataclass(frozen=True)
class PoolBlocks(Blocks):
    """Where the pieces of pools [B, 1, P, X] are; a pool holds the segments of K heads.

    Attributes:
        segments: K, segments in a pool.
        pool_rows: P.
        align: rows of a DMA tile; segments start, and the pool ends, at multiples of it.
    """

    segments: int
    pool_rows: int
    align: int

    def array(self, owner: jax.Array) -> jax.Array:
        return owner // self.segments

    def first_row(self, row: jax.Array) -> jax.Array:
        """A block that would pass the pool's end starts earlier; its first rows are then dead."""
        return jnp.minimum(row, self.pool_rows - self.size)

    def spec(self, width: int) -> pl.BlockSpec:
        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            row = pl.multiple_of(piece.row, self.align)  # what Mosaic must know to make the DMA
            return self.array(piece.owner), 0, row, 0

        shape = (pl.Element(1), pl.Element(1), pl.Element(self.size), pl.Element(width))
        return pl.BlockSpec(shape, index)

    def row_spec(self) -> pl.BlockSpec:
        """A block of [B, 1, rows] that holds the numbers of a piece's rows, and 128 more.

        Rows are lanes here. A DMA of lanes starts at a multiple of 128, but a segment need not.
        """
        whole = self.size == self.pool_rows

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            begin = 0 if whole else pl.multiple_of(self._first_lane(piece), LANES)
            return self.array(piece.owner), 0, begin

        shape = 1, 1, row_span(self.pool_rows, self.size)
        return pl.BlockSpec(shape if whole else tuple(map(pl.Element, shape)), index)

    def read_rows(self, ref: Any, piece: Piece) -> jax.Array:
        rows = ref[0]
        if self.size == self.pool_rows:
            return rows
        # The wanted rows start `shift` lanes into the block: rotate them to the front.
        wide = rows.shape[1]
        shift = piece.row - self._first_lane(piece)
        return pltpu.roll(rows, (wide - shift) % wide, axis=1)[:, : self.size]

    def _first_lane(self, piece: Piece) -> jax.Array:
        """Where the block of `row_spec` begins."""
        last = self.padded_rows() - row_span(self.pool_rows, self.size)
        return jnp.minimum(piece.row // LANES * LANES, last)

    def padded_rows(self) -> int:
        """Rows that [B, 1, rows] must have for `row_spec`."""
        return padded_rows(self.pool_rows, self.size)


@functools.partial(jax.jit, static_argnames=("blocks", "scale", "softcap", "shares"))
def attend(
    x: Operands,
    work: WorkList,
    blocks: Blocks,
    scale: float,
    softcap: float | None,
    shares: int,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of each segment's queries over its live rows.

    Args:
        x: queries [U, C, G, X], entries [A, C, rows, ·] and numbers of rows [A, C, rows], for the
            U segments of A arrays.
        work: the pieces of `blocks.size` rows, with the owner of each piece.
        blocks: where the pieces are.
        shares: cores that work on the list.

    Returns:
        out [U, C, G, Y] and lse [U, C, G] fp32; 0 and −1e30 for segments without live rows. out has
        the queries' dtype, or fp32 if there are results of several shares to merge.
    """
    U, C, G, _ = x.queries[0].shape
    Y = x.values.shape[-1]
    dtype = x.queries[0].dtype if shares == 1 else jnp.float32
    # The grid is as long as the list: its length is known when the kernel starts. The steps of a
    # share run in order ("arbitrary") and pass the softmax on in scratch memory: the largest logit,
    # the sum of the weights, and the sum of weights · values.
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(work),
        grid=(shares, work.bounds[1]),
        in_specs=[_specs(x, blocks)],
        out_specs=[_by_owner(blocks, (1, 1, C, G, Y)), _by_owner(blocks, (1, 1, C, G))],
        scratch_shapes=[
            pltpu.VMEM((C, G, 1), jnp.float32),
            pltpu.VMEM((C, G, 1), jnp.float32),
            pltpu.VMEM((C, G, Y), jnp.float32),
        ],
    )
    out, lse = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, scale=scale, softcap=softcap),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((shares, U, C, G, Y), dtype),
            jax.ShapeDtypeStruct((shares, U, C, G), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
    )(*work, _in_hbm(x))
    return combine(out, lse, work, blocks.size)


def _in_hbm(x: Operands) -> Operands:
    """The operands, with entries and numbers of rows kept in HBM.

    XLA would otherwise move a cache that fits into VMEM there before each update and back after
    it, dead rows included: twice the traffic of a cache without dead rows.
    """

    def stay(entries):
        return jax.tree.map(lambda e: pltpu.with_memory_space_constraint(e, pltpu.HBM), entries)

    names = ("keys", "own_values", "key_scales", "own_value_scale", "positions")
    return x._replace(**{name: stay(getattr(x, name)) for name in names})


def _specs(x: Operands, blocks: Blocks) -> Operands:
    """A block spec for each operand."""

    def of_owner(q):
        def index(share, step, *work):
            return blocks.piece(share, step, WorkList(*work)).owner, 0, 0, 0

        return pl.BlockSpec((1, *q.shape[1:]), index)

    def of_entries(entries):
        return blocks.spec(entries.shape[3])

    def of_rows(_):
        return blocks.row_spec()

    def scalars(_):
        return pl.BlockSpec(memory_space=pltpu.SMEM)

    kinds = Operands(of_owner, of_entries, of_entries, of_rows, of_rows, of_rows, scalars)
    return Operands(*(jax.tree.map(kind, field) for kind, field in zip(kinds, x, strict=True)))


def _by_owner(blocks: Blocks, shape: tuple[int, ...]) -> pl.BlockSpec:
    """The block of [shares, U, …] that a piece's segment and share own."""

    def index(share, step, *work):
        owner = blocks.piece(share, step, WorkList(*work)).owner
        return share, owner, *(0,) * (len(shape) - 2)

    return pl.BlockSpec(shape, index)


def _kernel(*refs, blocks: Blocks, scale: float, softcap: float | None):
    """One grid step. The accumulators stay in scratch memory from one piece of a segment to the
    next, because the steps of a share run in order."""
    *work, x, out_ref, lse_ref, top_ref, total_ref, acc_ref = refs
    work, step = WorkList(*work), pl.program_id(1)
    piece = blocks.piece(pl.program_id(0), step, work)
    whole = (piece.low == 0) & (piece.high == blocks.size)
    state = top_ref, total_ref, acc_ref

    # The first piece of a segment in this share starts a new softmax.
    @pl.when(piece.valid & ((step == 0) | (piece.owner != _neighbour(work, piece, -1))))
    def _():
        top_ref[...] = jnp.full_like(top_ref, NEG_INF)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    # Most blocks are live to the last row: they need no masks.
    @pl.when(piece.valid & whole)
    def _():
        _update(x, piece, state, blocks, scale, softcap, masked=False)

    @pl.when(piece.valid & ~whole)
    def _():
        _update(x, piece, state, blocks, scale, softcap, masked=True)

    # The last piece of a segment in this share writes the result. Other shares may have more of the
    # segment: `combine` merges them.
    last = (step == work.bounds[1] - 1) | (piece.number == work.bounds[0] - 1)

    @pl.when(piece.valid & (last | (piece.owner != _neighbour(work, piece, 1))))
    def _():
        total = jnp.maximum(total_ref[...], 1e-30)
        out_ref[0, 0] = (acc_ref[...] / total).astype(out_ref.dtype)
        lse = jnp.where(total_ref[...] > 0, top_ref[...] + jnp.log(total), NEG_INF)
        lse_ref[0, 0] = lse[..., 0]


def _neighbour(work: WorkList, piece: Piece, step: int) -> jax.Array:
    """The segment of the piece that is `step` places further in the list."""
    number = jnp.clip(piece.number + step, 0, work.owners.shape[0] - 1)
    return work.owners[number]


def _update(x, piece, state, blocks, scale, softcap, masked: bool):
    """One step of the online softmax (arXiv 2205.14135).

    Args:
        masked: whether the block may hold dead rows, which may hold NaN: keys, scales and values of
            such rows are replaced by zeros or masked.
    """
    top_ref, total_ref, acc_ref = state
    dtype = x.queries[0].dtype
    # Logits [C, G, size]: latent attention adds the products of two kinds of keys.
    logits = sum(
        _logits(q[0], k[0], k_scale, blocks, piece)
        for q, k, k_scale in zip(x.queries, x.keys, x.key_scales, strict=True)
    )
    logits = soft_cap(logits * scale, softcap)

    # Mask the rows outside of the segment, and those outside of the sliding window.
    live = _rows(piece, logits.shape, 2) if masked else None
    if x.positions is not None:
        than = x.than[blocks.array(piece.owner)]
        visible = blocks.read_rows(x.positions, piece)[:, None] > than
        live = visible if live is None else live & visible
    logits = _keep(live, logits, NEG_INF)

    # Rescale what has been summed so far to the new largest logit.
    top = jnp.maximum(top_ref[...], jnp.max(logits, axis=-1, keepdims=True))
    weights = _keep(live, jnp.exp(logits - top), 0.0)
    shrink = jnp.exp(top_ref[...] - top)
    top_ref[...] = top
    total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=-1, keepdims=True)

    # The scale of a value multiplies its weight, so that values are never rebuilt. Then add the
    # weighted values; 0 · NaN is NaN, so dead values become 0 first.
    if x.value_scale is not None:
        weights = _keep(live, weights * blocks.read_rows(x.value_scale, piece)[:, None], 0.0)
    values = _plain(x.values[0], dtype)
    values = _keep(_rows(piece, values.shape, 1) if masked else None, values, 0.0)
    acc_ref[...] = acc_ref[...] * shrink + _dot(weights.astype(dtype), values, 1)


def _logits(q, k, k_scale, blocks, piece):
    """Products of queries and keys, [C, G, size] fp32."""
    logits = _dot(q, _plain(k, q.dtype), 2)
    return logits if k_scale is None else logits * blocks.read_rows(k_scale, piece)[:, None]


def _rows(piece: Piece, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Whether the rows along `axis` of an array of this shape are live."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (row >= piece.low) & (row < piece.high)


def _keep(live: jax.Array | None, x: jax.Array, other: float) -> jax.Array:
    """x where live, else `other`; x itself without a mask."""
    return x if live is None else jnp.where(live, x, jnp.asarray(other, x.dtype))


def _plain(values: jax.Array, dtype: Any) -> jax.Array:
    return values if values.dtype == dtype else values.astype(dtype)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The product of a [C, G, ·] and b [C, ·, ·] over b's `axis`, for each C, in fp32."""
    # The default precision would round float32 operands to bfloat16.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(
        a, b, numbers, precision=precision, preferred_element_type=jnp.float32
    )
