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
    def span(self) -> None:
        """The pool is theirs alone."""
        return None

    def on(self, device: Any, batch: int) -> StaticSegments:
        """The same on every device; see `DeviceSegments`."""
        return self

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

    def room(self, pool_rows: int) -> jax.Array:
        """[1, K] the most live rows of each segment."""
        return _row(self.capacities)

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
    """Segments that differ from sequence to sequence, or from device to device.

    Attributes:
        starts, capacities: [B, K] int32, ascending.
        align: starts are multiples of it, so that a block of `align` rows has one head.
        span: rows from the first start on that hold all segments, where the pool holds others'
            too, a multiple of `align`; the first start is then the same for all sequences. None:
            the pool is theirs alone, and the first start is 0.
    """

    starts: Any
    capacities: Any
    align: int = field(metadata={"static": True})
    span: int | None = field(default=None, metadata={"static": True})

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
        return head, jnp.where((rank >= 0) & (rank < capacity), rank, NOWHERE)

    def room(self, pool_rows: int) -> jax.Array:
        """[B, K] the most live rows of each segment: its capacity, unless the next segment, or the
        end of the span or of the pool, comes before."""
        end = jnp.full_like(self.starts[:, :1], pool_rows)
        if self.span is not None:
            end = jnp.minimum(end, self.starts[:, :1] + self.span)
        ends = jnp.minimum(jnp.concatenate([self.starts[:, 1:], end], axis=1), end)
        rows = jnp.minimum(self.capacities, ends - self.starts)
        return jnp.where(self.starts < 0, 0, jnp.maximum(rows, 0))

    def longest(self, pool_rows: int) -> int:
        """Rows that a segment cannot exceed."""
        return pool_rows if self.span is None else self.span

    def window(self, pool_rows: int) -> tuple[jax.Array, TracedSegments]:
        """The first of `span` pool rows that hold all segments, and the segments in these rows."""
        assert self.span is not None
        first = jnp.minimum(self.starts[0, 0], pool_rows - self.span)
        return first, TracedSegments(self.starts - first, self.capacities, self.align)

    def block_size(self, pool_rows: int) -> int | None:
        """`align`, if it divides the pool."""
        return self.align if pool_rows % self.align == 0 else None

    def block_heads(self, pool_rows: int) -> jax.Array:
        """[B, C, 1] the head of each block."""
        return self._owners(jnp.arange(0, pool_rows, self.align, dtype=jnp.int32))[:, :, None]

    def _owners(self, rows: jax.Array) -> jax.Array:
        """[B, ·] the last head whose segment begins at or before each row; the first before all."""
        begun = self.starts[:, :, None] <= rows[None, None]
        return jnp.maximum(jnp.sum(begun, axis=1, dtype=jnp.int32) - 1, 0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class DeviceSegments:
    """Segments that are part of the program, other ones on every device of a mesh axis.

    Attributes:
        starts, capacities: of each device's heads, in the rows of that device's pool.
        align: starts are multiples of it.
        span: rows from a device's first start on that hold its segments, on every device.
    """

    starts: tuple[tuple[int, ...], ...]
    capacities: tuple[tuple[int, ...], ...]
    align: int
    span: int

    @property
    def num_heads(self) -> int:
        """K, of all devices."""
        return sum(map(len, self.starts))

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """Starts and capacities, [1, K] int32, device after device."""
        return _row(sum(self.starts, ())), _row(sum(self.capacities, ()))

    def on(self, device: Any, batch: int) -> TracedSegments:
        """The segments of one device, for so many sequences."""
        tables = (jnp.asarray(np.asarray(t, np.int32)) for t in (self.starts, self.capacities))
        starts, capacities = (jnp.tile(table[device][None], (batch, 1)) for table in tables)
        return TracedSegments(starts, capacities, self.align, self.span)


Segments = StaticSegments | TracedSegments


def _row(values: Any) -> jax.Array:
    """[1, …] of values that are the same for every sequence."""
    return jnp.asarray(np.asarray(values, np.int32))[None]


def common_alignment(segments: Segments, pool: Any) -> int:
    """The most rows that every segment's start and the pool's end are multiples of."""
    starts = segments.starts if isinstance(segments, StaticSegments) else (segments.align,)
    return math.gcd(*starts, pool.shape[1])
