"""Where a piece of the work list finds its rows: index maps over scalars that lie in SMEM."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.plan import WorkList
from pallas_kernels.tpu.memory import LANES
from pallas_kernels.tpu.tiles import padded_rows, row_window


class Piece(NamedTuple):
    """A grid step, in scalars.

    Attributes:
        number: in the work list; the last one for steps beyond its end.
        valid: whether the step is in the list.
        owner: the segment.
        block: number of the block within the segment.
        row: first row of the block in the array that holds the segment.
        low, high: the block's live rows.
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
    """Blocks of `size` rows of arrays [A, C, rows, X]; each segment is one A, from row 0 on.

    What belongs to rows, such as scales, comes as [A, C, rows].

    Attributes:
        size: rows of a block.
        heads: C, KV heads that a piece reads at once.
    """

    size: int
    heads: int

    def piece(self, share: Any, step: Any, work: WorkList) -> Piece:
        """The piece of a grid step; `work` holds SMEM refs."""
        number = share * work.bounds[1] + step
        held = jnp.maximum(jnp.minimum(number, work.bounds[0] - 1), 0)
        owner = work.owners[held]
        block = held - work.firsts[owner] + work.begins[owner] // self.size
        begin, start = block * self.size, work.starts[owner]
        row = self.first_row(start + begin)
        low = jnp.maximum(work.begins[owner], begin) + start - row
        high = jnp.minimum(work.ends[owner], begin + self.size) + start - row
        return Piece(held, number < work.bounds[0], owner, block, row, low, high)

    def first_row(self, row: jax.Array) -> jax.Array:
        """Where a block that should begin at `row` begins; the last one may be cut short."""
        return row

    def spec(self, width: int) -> pl.BlockSpec:
        """The block of [A, C, rows, width] that a piece reads."""

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            return piece.owner, 0, piece.block, 0

        return pl.BlockSpec((1, self.heads, self.size, width), index)

    def row_spec(self, rows: int) -> pl.BlockSpec:
        """The block of [A, C, rows] that a piece reads."""

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            return piece.owner, 0, piece.block

        return pl.BlockSpec((1, self.heads, self.size), index)

    def read_rows(self, ref: Any, piece: Piece) -> jax.Array:
        """[C, size] of what belongs to the piece's rows."""
        return ref[0]


@dataclass(frozen=True)
class PoolBlocks(Blocks):
    """Blocks of pools [B, 1, P, X] that hold the segments of K heads, from any aligned row on.

    Attributes:
        segments: K, segments of a pool.
        pool_rows: P.
        align: rows of a DMA tile; segments start, and the pool ends, at multiples of it.
    """

    segments: int
    pool_rows: int
    align: int

    def first_row(self, row: jax.Array) -> jax.Array:
        """A block that would pass the pool's end is moved back."""
        return jnp.minimum(row, self.pool_rows - self.size)

    def spec(self, width: int) -> pl.BlockSpec:
        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            row = pl.multiple_of(piece.row, self.align)
            return piece.owner // self.segments, 0, row, 0

        shape = (pl.Element(1), pl.Element(1), pl.Element(self.size), pl.Element(width))
        return pl.BlockSpec(shape, index)

    def row_spec(self, rows: int) -> pl.BlockSpec:
        """The rows of a piece and up to 128 more: a DMA of lanes starts at multiples of 128, a
        segment does not."""
        whole = self.size == self.pool_rows

        def index(share, step, *work):
            piece = self.piece(share, step, WorkList(*work))
            begin = 0 if whole else pl.multiple_of(self._first_lane(piece), LANES)
            return piece.owner // self.segments, 0, begin

        shape = 1, 1, row_window(self.pool_rows, self.size)
        return pl.BlockSpec(shape if whole else tuple(map(pl.Element, shape)), index)

    def read_rows(self, ref: Any, piece: Piece) -> jax.Array:
        rows = ref[0]
        if self.size == self.pool_rows:
            return rows
        wide = rows.shape[1]
        shift = piece.row - self._first_lane(piece)
        return pltpu.roll(rows, (wide - shift) % wide, axis=1)[:, : self.size]

    def _first_lane(self, piece: Piece) -> jax.Array:
        """Where the window of what belongs to the piece's rows begins."""
        last = self.padded_rows() - row_window(self.pool_rows, self.size)
        return jnp.minimum(piece.row // LANES * LANES, last)

    def padded_rows(self) -> int:
        """Rows that [B, 1, rows] must have for `row_spec`."""
        return padded_rows(self.pool_rows, self.size)
