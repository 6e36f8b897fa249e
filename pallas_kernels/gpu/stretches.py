"""The part of the work list that a block of threads works off, segment by segment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu.plan import BLOCK
from pallas_kernels.plan import WorkList


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
        pieces = pl.cdiv(work.ends[owner], BLOCK) - work.begins[owner] // BLOCK
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
