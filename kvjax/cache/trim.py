"""Caches without room, as they are kept in a file: of one sequence, on one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.dense import DenseCache
from kvjax.cache.entries import from_bits_everywhere
from kvjax.cache.latent import LatentCache
from kvjax.cache.layers import ModelCache
from kvjax.cache.pool import Pool
from kvjax.cache.sharded import ShardedHeads, ShardedSlots


def trimmed(caches: ModelCache) -> ModelCache:
    """The entries of one sequence, as one device without a mesh holds them: nothing but live rows,
    each head once, floats as floats."""
    ways = 1 if caches.layout is None else caches.layout.ways
    own = tuple(None if cache is None else without_room(cache) for cache in caches.own)
    pools = tuple(trimmed_pool(pool, ways, caches.copies) for pool in caches.pools)
    bare = dataclasses.replace(caches, own=own, pools=pools, layout=None, copies=1)
    return from_bits_everywhere(bare)


@functools.singledispatch
def without_room(cache: Any) -> Any:
    """One layer's cache of one sequence, with the slots that are in use."""
    raise TypeError(f"no way to trim a {type(cache).__name__}")


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
        for name in ("k", "v")
    }
    return without_room(dataclasses.replace(cache.inner, **once))


@without_room.register
def _(cache: ShardedSlots) -> LatentCache:
    # Where all tokens were kept a slot tells its position; over a mesh it is written down.
    positions = None if cache.inner.evicted is None else cache.inner.positions
    return without_room(dataclasses.replace(cache.inner, positions=positions))


def _first_slots(cache: Any, axes: dict[str, int]) -> Any:
    """The slots that are in use of arrays whose axis of slots is known."""
    used = int(cache.used[0])

    def cut(entries: Any, axis: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, used, axis=axis), entries)

    return dataclasses.replace(
        cache, **{name: cut(getattr(cache, name), axes[name]) for name in axes}
    )


def trimmed_pool(pool: Pool, ways: int, copies: int) -> Pool:
    """The live rows of one sequence, head after head.

    Args:
        ways: devices whose rows follow each other, see `Pool`.
        copies: see `ShardedHeads`.
    """
    starts, kept, capacities = (np.asarray(t) for t in (pool.starts, pool.kept, pool.capacities))
    devices = np.arange(starts.shape[2]) * ways // starts.shape[2]
    starts = (starts + devices * (pool.k.shape[1] // ways))[:, :, ::copies]
    held = np.minimum(kept, capacities)[:, :, ::copies]
    segments = zip(starts.flat, held.flat, strict=True)
    rows = np.concatenate([np.arange(start, start + count) for start, count in segments])
    ends = np.cumsum(held, dtype=np.int32).reshape(held.shape)
    whole = jnp.asarray(held)
    names = [name for name in ("k", "v", "positions") if getattr(pool, name) is not None]
    taken = {
        name: jax.tree.map(lambda x: jnp.take(x, rows, axis=1), getattr(pool, name))
        for name in names
    }
    tables = {
        "starts": jnp.asarray(ends - held),
        **dict.fromkeys(("kept", "capacities", "rings"), whole),
    }
    return dataclasses.replace(pool, **taken, **tables, align=1, span=None)
