"""Where the parts of a cache lie on a mesh, and what one device has of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kvjax.cache.dense import DenseCache
from kvjax.cache.head_budget import HeadBudgetCache
from kvjax.cache.latent import LatentCache
from kvjax.mesh import Layout
from pallas_kernels.segments import DeviceSegments, TracedSegments


@functools.singledispatch
def specs(cache: Any, layout: Layout) -> Any:
    """How a cache's arrays are split: the cache with `PartitionSpec`s in their place."""
    raise TypeError(f"no split of a {type(cache).__name__}")


@specs.register
def _(cache: DenseCache, layout: Layout) -> DenseCache:
    heads, rows = layout.spec("batch", "tensor"), layout.spec("batch")
    return _with_specs(cache, {"k": heads, "v": heads}, rows)


@specs.register
def _(cache: LatentCache, layout: Layout) -> LatentCache:
    slots, rows = layout.spec("batch", "tensor"), layout.spec("batch")
    return _with_specs(cache, dict.fromkeys(("latent", "k_rope", "positions"), slots), rows)


@specs.register
def _(cache: HeadBudgetCache, layout: Layout) -> HeadBudgetCache:
    heads, rows = layout.spec("batch", "tensor"), layout.spec("batch")
    own = {"lengths": rows, "queries": layout.spec("batch", None, "tensor")}
    segments = jax.tree.map(lambda _: heads, cache.segments)
    return dataclasses.replace(_with_specs(cache, own, heads), segments=segments)


def _with_specs(cache: Any, own: dict[str, PartitionSpec], rest: PartitionSpec) -> Any:
    """A spec for every field that is not None; for entries in 8 bits one serves all parts."""
    fields = [field.name for field in dataclasses.fields(cache)]
    present = [name for name in fields if getattr(cache, name) is not None]
    return dataclasses.replace(cache, **{name: own.get(name, rest) for name in present})


def place(cache: Any, layout: Layout) -> Any:
    """The cache, its arrays where they belong."""
    return with_shardings(
        jax.lax.with_sharding_constraint, specs(cache, layout), cache, layout.mesh
    )


def with_shardings(function: Callable[[Any, Any], Any], parts: Any, cache: Any, mesh: Any) -> Any:
    """function(array, sharding) of every array of a cache; `parts` has the specs, see `specs`."""

    def put(spec: PartitionSpec, part: Any) -> Any:
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: function(x, sharding), part)

    return jax.tree.map(put, parts, cache, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def on_device(cache: Any, layout: Layout) -> Any:
    """Inside `Layout.run`: the part of a cache with the segments that this device has."""
    segments = getattr(cache, "segments", None)
    if isinstance(segments, DeviceSegments):
        own = segments.on(layout.device(), cache.lengths.shape[0])
        return dataclasses.replace(cache, segments=own)
    return cache


def with_segments(cache: Any, segments: Any) -> Any:
    """The cache as it is stored: segments of all devices are part of the program."""
    if segments is None or isinstance(segments, TracedSegments):
        return cache
    return dataclasses.replace(cache, segments=segments)
