"""Where each head's rows lie in a flat pool: known at compile time, or only at run time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZES = (64, 32, 16, 8)
LARGE_BLOCKS = BLOCK_SIZES[:-1]
"""Blocks that cost less for one head than the largest does for two (measured)."""
NOWHERE = np.iinfo(np.int32).max


@jax.tree_util.register_static
@dataclass(frozen=True)
class StaticSegments:
    """Segments that are part of the program: head k owns starts[k] … starts[k] + capacities[k]."""

    starts: tuple[int, ...]
    capacities: tuple[int, ...]

    @property
    def align(self) -> int:
        """Nothing is known of where segments start."""
        return 1

    @property
    def num_heads(self) -> int:
        """K."""
        return len(self.starts)

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Starts and capacities, [1, K] int32."""
        return _row(self.starts), _row(self.capacities)

    def rows(self, pool_rows: int) -> tuple[jax.Array, jax.Array]:
        """Of each pool row its head and its rank in the segment, [1, P]; ranks of gaps are huge."""
        head, rank = np.zeros(pool_rows, np.int32), np.full(pool_rows, NOWHERE, np.int32)
        for index, (start, capacity) in enumerate(zip(self.starts, self.capacities, strict=True)):
            head[start : start + capacity] = index
            rank[start : start + capacity] = np.arange(capacity)
        return _row(head), _row(rank)

    def longest(self, pool_rows: int) -> int:
        """Rows of the largest segment."""
        return max(self.capacities)

    def block_size(self, pool_rows: int) -> int | None:
        """The largest block that no two heads share; else the largest that divides the pool.

        A shared block meets the queries of both its heads, at up to twice the cost. None: the
        pool's rows are no multiple of any block.
        """
        whole = math.gcd(pool_rows, *self.starts)
        fits = [size for size in BLOCK_SIZES if pool_rows % size == 0]
        own = [size for size in fits if size in LARGE_BLOCKS and whole % size == 0]
        return next(iter(own or fits), None)

    def block_heads(self, pool_rows: int) -> jax.Array:
        """[1, C, M] the heads that own rows of each of C equal blocks.

        M is the most that one block has, seldom more than two; others fill up with heads that
        have no rows in the block.
        """
        size = self.block_size(pool_rows)
        assert size is not None
        first = np.arange(0, pool_rows, size)
        ends = np.add(self.starts, self.capacities)
        present = (np.asarray(self.starts) < first[:, None] + size) & (ends > first[:, None])
        most = max(int(present.sum(axis=1).max()), 1)
        # A stable sort of "absent" brings the heads that are present to the front.
        return _row(np.argsort(~present, axis=1, kind="stable")[:, :most])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TracedSegments:
    """Segments that differ from sequence to sequence.

    Attributes:
        starts, capacities: [B, K] int32, ascending, the first start is 0.
        align: starts are multiples of it, so that a block of `align` rows has one head.
    """

    starts: Any
    capacities: Any
    align: int = field(metadata={"static": True})

    @property
    def num_heads(self) -> int:
        """K."""
        return self.starts.shape[1]

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Starts and capacities, [B, K] int32."""
        return self.starts, self.capacities

    def rows(self, pool_rows: int) -> tuple[jax.Array, jax.Array]:
        """Of each pool row its head and its rank in the segment, [B, P]; ranks of gaps are huge."""
        row = jnp.arange(pool_rows, dtype=jnp.int32)
        head = self._owners(row)
        rank = row[None] - jnp.take_along_axis(self.starts, head, axis=1)
        capacity = jnp.take_along_axis(self.capacities, head, axis=1)
        return head, jnp.where(rank < capacity, rank, NOWHERE)

    def longest(self, pool_rows: int) -> int:
        """Rows that a segment cannot exceed."""
        return pool_rows

    def block_size(self, pool_rows: int) -> int | None:
        """`align`, if it divides the pool."""
        return self.align if pool_rows % self.align == 0 else None

    def block_heads(self, pool_rows: int) -> jax.Array:
        """[B, C, 1] the head of each block."""
        return self._owners(jnp.arange(0, pool_rows, self.align, dtype=jnp.int32))[:, :, None]

    def _owners(self, rows: jax.Array) -> jax.Array:
        """[B, ·] the last head whose segment begins at or before each row."""
        begun = self.starts[:, :, None] <= rows[None, None]
        return jnp.sum(begun, axis=1, dtype=jnp.int32) - 1


Segments = StaticSegments | TracedSegments


def _row(values: Any) -> jax.Array:
    """[1, …] of values that are the same for every sequence."""
    return jnp.asarray(np.asarray(values, np.int32))[None]


def common_alignment(segments: Segments, pool: Any) -> int:
    """The most rows that every segment's start and the pool's end are multiples of."""
    starts = segments.starts if isinstance(segments, StaticSegments) else (segments.align,)
    return math.gcd(*starts, pool.shape[1])
