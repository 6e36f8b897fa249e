"""Caches made larger and wider: room for more tokens, copies for more sequences."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.dense import DenseCache
from kvjax.cache.entries import take_rows
from kvjax.cache.head_budget import HeadBudgetCache, pool_alignment, static_segments
from kvjax.cache.latent import LatentCache
from kvjax.cache.slots import whole_slots
from pallas_kernels.segments import Segments, StaticSegments, TracedSegments


def repeat(cache: Any, count: int) -> Any:
    """The cache of one sequence for `count` sequences that go on from it."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), cache)


@functools.singledispatch
def with_room(cache: Any, room: int, window: int | None) -> Any:
    """The same entries in a cache with room for `room` more tokens, or a few more.

    Args:
        window: the layer's sliding window, beyond which no head needs more rows.
    """
    raise TypeError(f"no way to enlarge a {type(cache).__name__}")


@with_room.register
def _(cache: DenseCache, room: int, window: int | None) -> DenseCache:
    room = _whole_room(cache.k.shape[2], room)
    positions = _pad_positions(cache.positions, room)
    k, v = _pad(cache.k, room, 2), _pad(cache.v, room, 2)
    return dataclasses.replace(cache, k=k, v=v, positions=positions)


@with_room.register
def _(cache: LatentCache, room: int, window: int | None) -> LatentCache:
    room = _whole_room(cache.latent.shape[1], room)
    latent, k_rope = _pad(cache.latent, room, 1), _pad(cache.k_rope, room, 1)
    positions = _pad_positions(cache.positions, room)
    return dataclasses.replace(cache, latent=latent, k_rope=k_rope, positions=positions)


@with_room.register
def _(cache: HeadBudgetCache, room: int, window: int | None) -> HeadBudgetCache:
    segments, rows = _grown(cache.segments, room, window, cache.k_pool)
    B, K = cache.head_lengths.shape
    head, rank = (jnp.broadcast_to(x, (B, rows)) for x in segments.rows(rows))
    old_starts, _ = (jnp.broadcast_to(x, (B, K)) for x in cache.segments.arrays())
    live = rank < jnp.take_along_axis(cache.live_heads(), head, axis=1)
    source = jnp.where(live, jnp.take_along_axis(old_starts, head, axis=1) + rank, 0)
    positions = cache.positions
    if positions is not None:
        positions = jnp.where(live, jnp.take_along_axis(positions, source, axis=1), -1)
    return dataclasses.replace(
        cache,
        k_pool=take_rows(cache.k_pool, source, live),
        v_pool=take_rows(cache.v_pool, source, live),
        segments=segments,
        positions=positions,
    )


def _grown(segments: Segments, room: int, window: int | None, pool: Any) -> tuple[Segments, int]:
    """Segments with `room` more rows each, and the rows of their pool."""
    if isinstance(segments, StaticSegments):
        most = [max(size, min(size + room, window or size + room)) for size in segments.capacities]
        return static_segments(most, pool_alignment(pool.dtype))
    align, (_, K) = segments.align, segments.capacities.shape
    wanted = segments.capacities + room
    if window is not None:
        wanted = jnp.maximum(segments.capacities, jnp.minimum(wanted, window))
    rounded = -(-wanted // align) * align
    starts = jnp.cumsum(rounded, axis=1, dtype=jnp.int32) - rounded
    rows = pool.shape[1] + K * -(-room // align) * align
    return TracedSegments(starts, wanted, align), rows


def _whole_room(slots: int, room: int) -> int:
    """At least `room`, so that all slots together are as kernels want them."""
    return whole_slots(slots + room) - slots


def _pad_positions(positions: jax.Array | None, room: int) -> jax.Array | None:
    """[B, S + room], −1 in the new slots."""
    if positions is None:
        return None
    return jnp.pad(positions, ((0, 0), (0, room)), constant_values=-1)


def _pad(entries: Any, room: int, axis: int) -> Any:
    def pad(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, room if i == axis else 0) for i in range(leaf.ndim)])

    return jax.tree.map(pad, entries)
