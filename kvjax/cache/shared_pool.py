"""The pools of all layers in one a device, so that a device's memory is what its heads keep.

All devices run one program, so an array has the same shape on each. With a pool a layer, the
device with the layer's largest head decides for all of them: at one KV head a device that is three
times what the budgets of the published Llama-3 scores need. All layers together balance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kvjax.cache.head_budget import HeadBudgetCache
from kvjax.cache.specs import specs
from kvjax.cache.split import SplitHeads, places
from kvjax.mesh import Layout
from pallas_kernels.head_plan import lay_out
from pallas_kernels.segments import DeviceSegments

POOLS = ("k_pool", "v_pool", "positions")


@flax.struct.dataclass
class SharedPool:
    """Head-budgeted caches of all layers; `caches[3]` is that of the fourth, see `with_layer`.

    Attributes:
        pools: k_pool, v_pool [B, D · R, ·] and positions [B, D · R] or None, R rows a device.
        layers: the caches without their pools.
        layout, copies: see `SplitHeads`.
    """

    pools: dict[str, Any]
    layers: tuple[HeadBudgetCache, ...]
    layout: Layout = flax.struct.field(pytree_node=False)
    copies: int = flax.struct.field(pytree_node=False, default=1)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> SplitHeads:
        inner = dataclasses.replace(self.layers[index], **self.pools)
        return SplitHeads(inner, self.layout, self.copies)

    def __iter__(self) -> Iterator[SplitHeads]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def join(cls, caches: Sequence[SplitHeads]) -> SharedPool:
        """The same entries in one pool a device; they are alike, see `alike`."""
        if any(cache.inner.positions is not None for cache in caches):
            caches = [_with_positions(cache) for cache in caches]
        first = caches[0].inner
        layout, align = caches[0].layout, first.segments.align
        capacities = tuple(sum(cache.inner.segments.capacities, ()) for cache in caches)
        tables, rows = lay_out(capacities, layout.ways, align)
        bare = tuple(
            dataclasses.replace(cache.inner, segments=table, **dict.fromkeys(POOLS))
            for cache, table in zip(caches, tables, strict=True)
        )
        pools = {name: _empty(getattr(first, name), rows, name, layout) for name in POOLS}
        for cache, table in zip(caches, tables, strict=True):
            pools = _write(pools, cache.inner, table, layout)
        return cls(pools, bare, layout, caches[0].copies)


@singledispatch
def with_layer(caches: Any, index: int, cache: Any) -> Any:
    """The caches of all layers with that of one layer replaced."""
    return [*caches[:index], cache, *caches[index + 1 :]]


@with_layer.register
def _(caches: SharedPool, index: int, cache: SplitHeads) -> SharedPool:
    pools = {name: getattr(cache.inner, name) for name in POOLS}
    bare = dataclasses.replace(cache.inner, **dict.fromkeys(POOLS))
    layers = (*caches.layers[:index], bare, *caches.layers[index + 1 :])
    return dataclasses.replace(caches, pools=pools, layers=layers)


@singledispatch
def join_layers(first: Any, caches: list[Any]) -> Any:
    """Caches of all layers as decode takes them; `first` is that of the first layer."""
    return caches


@join_layers.register
def _(first: SplitHeads, caches: list[Any]) -> Any:
    return SharedPool.join(caches) if alike(caches) else caches


def alike(caches: list[Any]) -> bool:
    """Whether one pool can hold the entries of all layers: all are pools whose segments are part
    of the program, with entries of one width and kind."""
    inner: list[Any] = [getattr(cache, "inner", None) for cache in caches]
    if not all(isinstance(getattr(c, "segments", None), DeviceSegments) for c in inner):
        return False
    kinds = set()
    for cache in inner:
        leaves, tree = jax.tree.flatten((cache.k_pool, cache.v_pool))
        align = cache.segments.align
        kinds.add((tree, align, tuple((leaf.shape[2:], leaf.dtype) for leaf in leaves)))
    return len(kinds) == 1


def _with_positions(cache: SplitHeads) -> SplitHeads:
    """For layers without a sliding window, beside some that have one; nobody reads them."""
    inner = cache.inner
    if inner.positions is not None:
        return cache
    leaf = jax.tree.leaves(inner.k_pool)[0]
    positions = cache.layout.place(jnp.full(leaf.shape[:2], -1, jnp.int32), "batch", "tensor")
    return dataclasses.replace(cache, inner=dataclasses.replace(inner, positions=positions))


@places.register
def _(caches: SharedPool) -> Any:
    layout = caches.layout
    pools = jax.tree.map(lambda _: layout.spec("batch", "tensor"), caches.pools)
    layers = tuple(specs(layer, layout) for layer in caches.layers)
    return dataclasses.replace(caches, pools=pools, layers=layers), layout


def _empty(pool: Any, rows: int, name: str, layout: Layout) -> Any:
    """A pool of so many rows a device like this one; positions of no entry are −1."""

    def make(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0], layout.ways * rows, *leaf.shape[2:])
        return layout.place(jnp.full(shape, -(name == "positions"), leaf.dtype), "batch", "tensor")

    return jax.tree.map(make, pool)


def _write(
    pools: dict[str, Any], layer: HeadBudgetCache, table: DeviceSegments, layout: Layout
) -> dict[str, Any]:
    """A layer's rows in their place; the layers after it must be written later."""

    def run(pools: dict[str, Any], layer: HeadBudgetCache) -> dict[str, Any]:
        segments = table.on(layout.device(), 1)

        def write(pool: jax.Array, own: jax.Array) -> jax.Array:
            first, window = segments.window(pool.shape[1])
            # Where the window would reach beyond the pool it begins before the segments.
            before = window.starts[0, 0]
            old = jax.lax.dynamic_slice_in_dim(pool, first, table.span, 1)
            row = jnp.arange(table.span, dtype=jnp.int32)
            row = row.reshape(1, -1, *(1,) * (pool.ndim - 2))
            new = jnp.where(row < before, old, jnp.roll(own, before, axis=1))
            return jax.lax.dynamic_update_slice_in_dim(pool, new, first, 1)

        return {
            name: jax.tree.map(write, pool, getattr(layer, name)) for name, pool in pools.items()
        }

    part = specs(layer, layout)
    spec = {name: getattr(part, name) for name in POOLS}
    return layout.run(run, (spec, part), spec)(pools, layer)
