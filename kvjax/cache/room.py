"""Changes of a cache's size: room for more tokens, copies for more sequences, and the form without
room that a file stores. `keep_all` turns a prompt's cache into the uncompressed one of decoding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.attention import AttentionSpec
from kvjax.cache.dense import DenseCache, LatentCache
from kvjax.cache.layers import ModelCache, new_pool
from kvjax.cache.pool import (
    Pool,
    PoolLayer,
    bucket_rows,
    copy_rows,
    lay_segments,
    pool_alignment,
    pool_rows,
)
from kvjax.cache.sharded import ShardedHeads, ShardedSlots, head_copies, place, specs
from kvjax.cache.storage import as_pool, from_bits_everywhere, slot_numbers, whole_slots
from kvjax.mesh import Placement


@functools.partial(jax.jit, static_argnames=("room", "dtype", "spec"))
def keep_all(base: Any, room: int, dtype: str | None, spec: AttentionSpec) -> Any:
    """A prompt's whole cache with room for new tokens, its entries in `dtype`.

    Args:
        base: the cache, sharded or not; the result is sharded the same way.
        spec: scale, window and soft-cap of the layer.
    """
    whole = with_room(whole_of(base), room, None)
    live = slot_numbers(whole.lengths, whole.capacity) >= 0
    return spread_like(base, whole.cast(dtype, live, spec), spec.window)


def whole_of(base: Any) -> Any:
    """The cache of all heads and slots inside a sharded cache; another cache is returned as is."""
    return getattr(base, "inner", base)


def spread_like(base: Any, cache: Any, window: int | None) -> Any:
    """Shards a cache made from `whole_of(base)` the way `base` is sharded."""
    if isinstance(base, ShardedHeads):
        return ShardedHeads(place(cache, base.placement), base.placement, base.copies)
    if isinstance(base, ShardedSlots):
        return ShardedSlots.create(cache, base.placement, window)
    return cache


@functools.partial(jax.jit, static_argnames=("count", "room", "window"))
def repeated_with_room(cache: Any, count: int, room: int, window: int | None) -> Any:
    """The cache of one sequence for `count` sequences that continue it, see `with_room`."""
    return with_room(repeat(cache, count), room, window)


def repeat(cache: Any, count: int) -> Any:
    """The cache of one sequence, repeated for `count` sequences that continue it."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), cache)


@functools.singledispatch
def with_room(cache: Any, room: int, window: int | None) -> Any:
    """The same entries in a cache with room for at least `room` more tokens.

    Args:
        window: the layer's sliding window; no head needs more rows than its length.
    """
    raise TypeError(f"a {type(cache).__name__} cannot be enlarged")


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


def _whole_room(slots: int, room: int) -> int:
    """At least `room`, rounded up so that all slots together are whole tiles of the kernels."""
    return whole_slots(slots + room) - slots


def _pad_positions(positions: jax.Array | None, room: int) -> jax.Array | None:
    """[B, S + room], with −1 in the new slots."""
    if positions is None:
        return None
    return jnp.pad(positions, ((0, 0), (0, room)), constant_values=-1)


def _pad(entries: Any, room: int, axis: int) -> Any:
    def pad(leaf: jax.Array) -> jax.Array:
        return jnp.pad(leaf, [(0, room if i == axis else 0) for i in range(leaf.ndim)])

    return jax.tree.map(pad, entries)


def grow_pool(
    pool: Pool, batch: int, room: int, windows: tuple[int | None, ...], placement: Placement | None
) -> Pool:
    """The pool of one sequence as a pool for a batch that continues it, with room for more tokens.

    Args:
        pool: pool of one device, from `trimmed`.
        windows: the sliding window of each layer in the pool, None for none.
        placement: placement of the batch on a mesh; None for one device.
    """
    ways, platform = (1, None) if placement is None else (placement.ways, placement.platform)
    copies = head_copies(pool.kept.shape[2], ways)
    # Size the pool on the host: each head keeps its rows, on a mesh once for every copy.
    kept = np.repeat(np.asarray(pool.kept), copies, axis=2).astype(np.int64)
    limits = np.asarray([window or np.iinfo(np.int32).max for window in windows], np.int64)
    align = pool_alignment(pool.k.dtype, platform)
    size = pool_rows(kept, np.full_like(kept, room), limits, 0, align, ways)
    new = new_pool(
        (batch, *kept.shape[1:]),
        size.rows * ways,
        (pool.k.shape[-1], pool.v.shape[-1]),
        jnp.dtype(pool.k.dtype).name,
        pool.positions is not None,
        align,
        None if align == 1 else size.span,
        placement,
        repeat(pool.lengths, batch),
    )
    # Rows move as they are stored, so the sequences take over how their keys are normalised.
    channels = jax.tree.map(
        lambda x: jnp.repeat(jnp.repeat(x, batch, axis=0), copies, axis=2), pool.channels
    )
    new = dataclasses.replace(new, channels=channels)
    new = new if placement is None else place(new, placement)
    # Fill the pool layer by layer.
    pool = _with_spare_rows(pool)
    for row, window in enumerate(windows):
        first = np.repeat(size.first[:, row], batch, axis=0)
        settings = {"window": window, "placement": placement, "copies": copies}
        moved = _move_layer(new.layer(row), pool.layer(row), first, np.int32(room), **settings)
        new = new.with_layer(row, moved)
    return new


@jax.jit
def _with_spare_rows(pool: Pool) -> Pool:
    """The pool with its rows rounded up: pools of similar sizes then share a program."""
    spare = bucket_rows(pool.k.shape[1]) - pool.k.shape[1]
    k, v = _pad(pool.k, spare, 1), _pad(pool.v, spare, 1)
    return dataclasses.replace(pool, k=k, v=v, positions=_pad_positions(pool.positions, spare))


@functools.partial(
    jax.jit, static_argnames=("window", "placement", "copies"), donate_argnames="layer"
)
def _move_layer(
    layer: PoolLayer,
    old: PoolLayer,
    first_BD: jax.Array,
    room: jax.Array,
    window: int | None,
    placement: Placement | None,
    copies: int,
) -> PoolLayer:
    """A layer of a pool, with the entries of one old sequence copied to all its sequences."""
    starts, kept = (jnp.repeat(old.table(name), copies, axis=1) for name in ("starts", "kept"))

    def run(layer: PoolLayer, old: Any, begins: Any, kept: Any, first: Any, room: Any) -> PoolLayer:
        B, K = layer.pool.kept.shape[0], kept.shape[1]
        held = jnp.broadcast_to(kept, (B, K))
        rooms, rings = jnp.full((B, K), room), jnp.full((B, K), window is not None)
        # Where each head's rows start in the new pool.
        pool = lay_segments(layer.pool, layer.row, held, first[:, 0], rooms, rings, window)
        starts = jax.lax.dynamic_index_in_dim(pool.starts, layer.row, 1, keepdims=False)

        def copy(into: Any, entries: Any) -> Any:
            def rows(b: jax.Array, k: jax.Array, ranks: jax.Array) -> Any:
                return jax.tree.map(lambda leaf: leaf[0, begins[0, k] + ranks], entries)

            return copy_rows(into, rows, starts, held)

        moved = {name: copy(getattr(pool, name), entries) for name, entries in old.items()}
        return dataclasses.replace(layer, pool=dataclasses.replace(pool, **moved))

    # On a mesh every device reads the whole old pool, and copies the heads that it owns.
    names = [name for name in ("k", "v", "positions") if getattr(old.pool, name) is not None]
    entries = {name: as_pool(getattr(old.pool, name)) for name in names}
    arrays = (layer, entries, starts, kept, first_BD, room)
    if placement is None:
        return run(*arrays)
    parts, heads, all_of = specs(layer, placement), placement.spec(None, "tensor"), placement.spec()
    places = (parts, all_of, heads, heads, placement.spec("batch", "tensor"), all_of)
    return placement.run(run, places, parts)(*arrays)


def trimmed(caches: ModelCache) -> ModelCache:
    """The entries of one sequence as one device without a mesh stores them: only live rows, each
    head once, and floats in place of bit patterns."""
    ways = 1 if caches.placement is None else caches.placement.ways
    own = tuple(None if cache is None else without_room(cache) for cache in caches.own)
    pools = tuple(trimmed_pool(pool, ways, caches.copies) for pool in caches.pools)
    bare = dataclasses.replace(caches, own=own, pools=pools, placement=None, copies=1)
    return from_bits_everywhere(bare)


@functools.singledispatch
def without_room(cache: Any) -> Any:
    """One layer's cache of one sequence, with only the slots in use."""
    raise TypeError(f"a {type(cache).__name__} cannot be trimmed")


@without_room.register
def _(cache: DenseCache) -> DenseCache:
    return _first_slots(cache, {"k": 2, "v": 2, "positions": 1})


@without_room.register
def _(cache: LatentCache) -> LatentCache:
    return _first_slots(cache, {"latent": 1, "k_rope": 1, "positions": 1})


@without_room.register
def _(cache: ShardedHeads) -> DenseCache:
    once = {
        name: jax.tree.map(lambda x: x[:, :: cache.copies], getattr(cache.inner, name))
        for name in ("k", "v", "channels")
    }
    return without_room(dataclasses.replace(cache.inner, **once))


@without_room.register
def _(cache: ShardedSlots) -> LatentCache:
    # ShardedSlots writes positions for a window; they equal the slots unless tokens were removed.
    positions = None if cache.inner.evicted is None else cache.inner.positions
    return without_room(dataclasses.replace(cache.inner, positions=positions))


def _first_slots(cache: Any, axes: dict[str, int]) -> Any:
    """The slots in use; `axes` gives the axis of slots for each array."""
    entries = tuple(getattr(cache, name) for name in axes)
    kept = _cut(entries, int(cache.used[0]), tuple(axes.values()))
    return dataclasses.replace(cache, **dict(zip(axes, kept, strict=True)))


@functools.partial(jax.jit, static_argnames=("used", "axes"))
def _cut(entries: tuple[Any, ...], used: int, axes: tuple[int, ...]) -> tuple[Any, ...]:
    """The first `used` slots of each entry, along the entry's axis."""

    def cut(entry: Any, axis: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, used, axis=axis), entry)

    return tuple(cut(entry, axis) for entry, axis in zip(entries, axes, strict=True))


def trimmed_pool(pool: Pool, ways: int, copies: int) -> Pool:
    """The live rows of one sequence, head after head.

    Args:
        ways: number of devices; their rows follow each other, see `Pool`.
        copies: see `ShardedHeads`.
    """
    starts, kept, capacities = (np.asarray(t) for t in (pool.starts, pool.kept, pool.capacities))
    given = kept + np.asarray(pool.lengths - pool.read)[:, None, None]
    # Starts count from a device's first row: make them count from the pool's, each head once.
    devices = np.arange(starts.shape[2]) * ways // starts.shape[2]
    starts = (starts + devices * (pool.k.shape[1] // ways))[:, :, ::copies]
    held = np.minimum(given, capacities)[:, :, ::copies]
    # Gather the live rows of all heads in the order of their tokens, which a ring has lost, and
    # write tables without room.
    segments = [
        np.arange(start, start + count) for start, count in zip(starts.flat, held.flat, strict=True)
    ]
    if pool.positions is not None:
        at = np.asarray(pool.positions)[0]
        segments = [rows[np.argsort(at[rows], kind="stable")] for rows in segments]
    rows = np.concatenate(segments)
    ends = np.cumsum(held, dtype=np.int32).reshape(held.shape)
    whole = jnp.asarray(held)
    taken = _take_rows({name: getattr(pool, name) for name in ("k", "v", "positions")}, rows)
    tables = {
        "starts": jnp.asarray(ends - held),
        **dict.fromkeys(("kept", "capacities", "rings"), whole),
    }
    channels = jax.tree.map(lambda x: x[:, :, ::copies], pool.channels)
    facts = {"read": pool.lengths, "channels": channels, "align": 1, "span": None}
    return dataclasses.replace(pool, **taken, **tables, **facts)


@jax.jit
def _take_rows(entries: Any, rows: jax.Array) -> Any:
    """The same rows of arrays [B, R, …]."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=1), entries)
