"""The caches of all layers, as prefill makes them and every step of decoding takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import singledispatch
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kvjax.cache.pool import Pool, PoolLayer
from kvjax.cache.sharded import ShardedHeads
from kvjax.mesh import Layout


@flax.struct.dataclass
class ModelCache:
    """One cache for each layer: `cache[3]` is that of the fourth.

    Attributes:
        own: for each layer its cache; None for a layer whose heads have budgets in a pool.
        pools: the pools; layers of one shape share one.
        rope_lengths: [B] int32, prompt and tokens to come, for RoPE rules that depend on them.
        places: for each layer the numbers of its pool and of its row in the pool's tables; None
            for a layer with a cache of its own.
        layout: how pools are split over a mesh; None for one device.
        copies: see `ShardedHeads`.
    """

    own: tuple[Any, ...]
    pools: tuple[Pool, ...]
    rope_lengths: Any
    places: tuple[tuple[int, int] | None, ...] = flax.struct.field(pytree_node=False)
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)
    copies: int = flax.struct.field(pytree_node=False, default=1)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> Any:
        place = self.places[index]
        if place is None:
            return self.own[index]
        layer = self.pools[place[0]].layer(place[1])
        return layer if self.layout is None else ShardedHeads(layer, self.layout, self.copies)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> jax.Array:
        """[B] int32, tokens that each sequence has given: the next one's position."""
        return self[0].lengths

    @property
    def capacity(self) -> Any:
        """Tokens that a sequence can give in all; [B] where sequences differ."""
        held = [cache for cache in self.own if cache is not None] + list(self.pools)
        return held[0].capacity if len(held) == 1 else min_capacity(held)

    def with_layer(self, index: int, cache: Any) -> ModelCache:
        """The caches with that of one layer replaced."""
        place = self.places[index]
        if place is None:
            own = (*self.own[:index], cache, *self.own[index + 1 :])
            return dataclasses.replace(self, own=own)
        return self.with_pool_layer(place, cache if self.layout is None else cache.inner)

    def with_pool_layer(self, place: tuple[int, int], layer: PoolLayer) -> ModelCache:
        """The caches with one layer of a pool replaced, as it lies on the devices.

        Args:
            place: the numbers of the pool and of the layer's row, see `places`.
        """
        number, row = place
        pool = self.pools[number].with_layer(row, layer)
        pools = (*self.pools[:number], pool, *self.pools[number + 1 :])
        return dataclasses.replace(self, pools=pools)

    def advance(self, lengths: jax.Array) -> ModelCache:
        """Pools that have counted the new tokens; caches of single layers have done so."""
        # Every pool has an array of its own: the next step's programs take them over.
        own = (lengths, *(lengths + 0 for _ in self.pools[1:]))
        pools = tuple(
            dataclasses.replace(pool, lengths=each, schedule=None)
            for pool, each in zip(self.pools, own, strict=False)
        )
        return dataclasses.replace(self, pools=pools)


def min_capacity(caches: list[Any]) -> jax.Array:
    """[B] the least capacity of several caches."""
    batch = caches[0].lengths.shape[0]
    each = [jnp.broadcast_to(jnp.asarray(cache.capacity), (batch,)) for cache in caches]
    return jnp.min(jnp.stack(each), axis=0)


@singledispatch
def with_layer(caches: Any, index: int, cache: Any) -> Any:
    """The caches of all layers with that of one layer replaced."""
    return [*caches[:index], cache, *caches[index + 1 :]]


@with_layer.register
def _(caches: ModelCache, index: int, cache: Any) -> ModelCache:
    return caches.with_layer(index, cache)


@singledispatch
def advance(caches: Any, lengths: jax.Array) -> Any:
    """The caches after all layers have seen new tokens, which are `lengths` [B] in all."""
    return caches


@advance.register
def _(caches: ModelCache, lengths: jax.Array) -> ModelCache:
    return caches.advance(lengths)


def rope_lengths_of(caches: Any) -> jax.Array:
    """[B] whole lengths, for RoPE rules that depend on them: what the caches remember, or how much
    caches from `init_cache` can hold."""
    if isinstance(caches, ModelCache):
        return caches.rope_lengths
    first = caches[0]
    return jnp.full(first.lengths.shape, first.capacity, jnp.int32)
