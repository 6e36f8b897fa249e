"""Plans on a mesh: each device's part of a prompt is cut down where it lies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.cache import DenseCache, HeadBudgetCache, LatentCache, PromptCache, join_layers
from kvjax.cache.head_budget import pool_alignment, static_segments
from kvjax.cache.latent import widened
from kvjax.cache.specs import on_device, place, specs, with_segments
from kvjax.cache.split import SplitHeads, SplitSlots
from kvjax.config import EqualCacheConfig
from kvjax.headkv.plan import Plan, sliding_windows
from kvjax.headkv.prompt import Prompt
from kvjax.headkv.selection import (
    Keep,
    capacities_for,
    choose,
    counted_segments,
    pack,
    split_alignment,
)
from kvjax.mesh import AnyMesh, Layout
from pallas_kernels.head_plan import lay_out
from pallas_kernels.segments import BLOCK_SIZES, DeviceSegments, StaticSegments, TracedSegments


def on_mesh(plan: Plan, mesh: AnyMesh | None) -> Plan:
    """The plan for parameters that lie on a mesh; the plan itself where that is None."""
    return plan if mesh is None else SplitPlan(plan, mesh)


@dataclass(frozen=True)
class SplitPlan(Plan):
    """A plan whose caches lie on a mesh: sequences over its batch axes, KV heads (or the slots of
    latents) over its tensor axis. What stays is what the plan keeps on one device.

    Keys that are rebuilt from latents at every step (`equal_cache` with RoPE after the
    up-projection) have neither heads nor slots that could be split: every device along the tensor
    axis holds them all.

    Attributes:
        plan: for one device.
        mesh: the parameters' own.
    """

    plan: Any  # a Plan with a `config`
    mesh: AnyMesh

    @property
    def every(self) -> int | None:  # type: ignore[override]
        return self.plan.every

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """See `Plan.start`.

        Raises:
            ValueError: the tensor axis fits neither the KV heads nor their multiples.
            NotImplementedError: a scorer that watches the prompt, on more devices than KV heads.
        """
        cache = self.plan.start(layer, batch, prompt_len, room, dtype)
        attention = self.plan.config.layers[layer].attention
        layout = Layout.create(self.mesh, batch)
        if isinstance(attention, EqualCacheConfig) and attention.rope_site == "after_up":
            layout = dataclasses.replace(layout, tensor=None)
            return _place_whole(cache, layout)
        return split(cache, layout, sliding_windows(self.plan.config)[layer])

    def heads(self, layer: int, cache: Any, room: int) -> tuple[Prompt, Keep] | None:
        """See `Plan.heads`."""
        return self.plan.heads(layer, cache, room)

    def rest(self, layer: int, cache: Any, room: int) -> Any:
        """See `Plan.rest`."""
        window = sliding_windows(self.plan.config)[layer]
        return split_again(base_of(cache), self.plan.rest(layer, whole(cache), room), window)

    def finish(self, layer: int, cache: Any, room: int) -> Any:
        """See `Plan.finish`."""
        found, base = self.heads(layer, cache, room), base_of(cache)
        if found is None:
            return self.rest(layer, cache, room)
        assert isinstance(base, SplitHeads)
        return compress_split(*found, base.inner.keys_and_values(), base)

    def between(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """See `Plan.between`: features over the tensor axis, so that a long prompt's stream is not
        on every device. A layer gathers one chunk of it at a time."""
        layout = Layout.create(self.mesh, x.shape[0])
        split = x.shape[2] % layout.ways == 0
        return layout.place(x, "batch", None, "tensor" if split else None)

    def join(self, caches: list[Any]) -> Any:
        """See `Plan.join`."""
        return join_layers(caches[0], caches)

    def refresh(self, layer: int, cache: SplitHeads) -> SplitHeads:
        """See `Plan.refresh`."""
        prompt, entries = grown_split(self.plan, layer, cache)
        return compress_split(prompt, self.plan.keep(layer, self.every), entries, cache)


def compress_split(
    prompt: Prompt, keep: Keep, entries: tuple[jax.Array, jax.Array], like: SplitHeads
) -> SplitHeads:
    """`compress_heads` on a mesh: chosen with all heads in sight, packed by every device.

    Args:
        prompt: of every head once.
        entries: keys and values as they lie, each head like.copies times.
        like: the layout to keep.
    """
    layout, copies = like.layout, like.copies
    kept, counts = (jnp.repeat(x, copies, axis=1) for x in choose(prompt, keep))
    rooms, rings = (np.repeat(x, copies).reshape(layout.ways, -1) for x in (keep.rooms, keep.rings))
    tile = pool_alignment(keep.dtype or prompt.keys.dtype, layout.platform)
    capacities = np.repeat(capacities_for(prompt, keep), copies).tolist()
    table, rows = device_segments(capacities, layout.ways, tile)

    def run(keys, values, queries, lengths, held, positions, kept, counts):
        arrays = (keys, values, queries, lengths, held, positions)
        part = Prompt(*arrays, None, prompt.spec, prompt.window)
        device = layout.device()
        own = jnp.asarray(rings)[device]
        if keep.split is None:
            segments = table.on(device, keys.shape[0])
            return with_segments(pack(part, kept, counts, segments, rows, keep, own), table)
        extra = jnp.asarray(rooms.astype(np.int32) + prompt.window)[device]
        # The whole budget of the layer may fall to the heads of one device.
        found = counted_segments(part, keep, counts, extra, tile)
        return pack(part, kept, counts, *found, keep, own)

    heads, each_row = layout.spec("batch", "tensor"), layout.spec("batch")
    shared = prompt.held.shape[1] == 1  # one row serves all heads
    held, positions = (
        x if shared else jnp.repeat(x, copies, axis=1) for x in (prompt.held, prompt.positions)
    )
    arrays = (*entries, prompt.queries, prompt.lengths, held, positions, kept, counts)
    places = (
        *(heads, heads, layout.spec("batch", None, "tensor"), each_row),
        *((each_row if shared else heads,) * 2),
        *(heads, heads),
    )
    traced = TracedSegments(0, 0, max(split_alignment(capacities_for(prompt, keep)), tile))
    packed = HeadBudgetCache(
        *(0, 0, 0, 0),
        segments=table if keep.split is None else traced,
        positions=None if prompt.spec.window is None else 0,
        ring_starts=0 if any(keep.rings) else None,
        queries=0 if keep.remember else None,
    )
    with jax.named_scope("pack"):
        inner = layout.run(run, places, specs(packed, layout))(*arrays)
    return SplitHeads(inner, layout, copies)


def device_segments(
    capacities: list[int], devices: int, tile: int
) -> tuple[StaticSegments | DeviceSegments, int]:
    """Segments of one layer over so many devices, and the rows of each one's pool.

    Args:
        tile: rows that the platform wants starts to be multiples of; 1 where any start will do.
    """
    if devices == 1:
        return static_segments(capacities, tile)
    # The same for all layers, whose pools are joined; the smallest of `BLOCK_SIZES`.
    (table,), rows = lay_out((tuple(capacities),), devices, max(tile, BLOCK_SIZES[-1]))
    return table, rows


def grown_split(
    plan: Any, layer: int, cache: SplitHeads
) -> tuple[Prompt, tuple[jax.Array, jax.Array]]:
    """What a compressed cache holds: of every head once, and keys and values as they lie."""
    layout = cache.layout

    def run(inner: HeadBudgetCache) -> tuple[jax.Array, ...]:
        prompt, _ = plan.grown(layer, on_device(inner, layout))
        return tuple(getattr(prompt, name) for name in names)

    names = ("keys", "values", "queries", "lengths", "held", "positions")
    heads, rows = layout.spec("batch", "tensor"), layout.spec("batch")
    out = (heads, heads, layout.spec("batch", None, "tensor"), rows, heads, heads)
    found = layout.run(run, (specs(cache.inner, layout),), out)(cache.inner)
    keys, values, queries, lengths, held, positions = found
    once = (x[:, :: cache.copies] for x in (keys, values, held, positions))
    keys_once, values_once, held, positions = once
    spec, window = plan.compared(layer)
    arrays = (keys_once, values_once, queries, lengths, held, positions)
    return Prompt(*arrays, None, spec, window), (keys, values)


@singledispatch
def split(cache: Any, layout: Layout, window: int | None) -> Any:
    """An empty cache, spread over a mesh.

    Raises:
        ValueError, NotImplementedError: see `SplitPlan.start`.
    """
    raise TypeError(f"no split of a {type(cache).__name__}")


@split.register
def _(cache: DenseCache, layout: Layout, window: int | None) -> SplitHeads:
    return SplitHeads.create(cache, layout)


@split.register
def _(cache: LatentCache, layout: Layout, window: int | None) -> SplitSlots:
    return SplitSlots.create(cache, layout, window)


@split.register
def _(cache: PromptCache, layout: Layout, window: int | None) -> PromptCache:
    base = split(cache.base, layout, window)
    if cache.observer is not None and getattr(base, "copies", 1) > 1:
        raise NotImplementedError(
            f"{type(cache.observer).__name__} watches the queries of whole groups, which "
            f"{layout.ways} devices along the tensor axis share: expected at most as many devices "
            "as KV heads"
        )
    if isinstance(base, SplitSlots):
        width = base.inner.latent.shape[-1] + base.inner.k_rope.shape[-1]
        return dataclasses.replace(cache, base=base, queries=widened(cache.queries, width))
    return dataclasses.replace(cache, base=base)


def base_of(cache: Any) -> Any:
    """The cache of the entries; that of a prompt is inside."""
    return cache.base if isinstance(cache, PromptCache) else cache


def whole(cache: Any) -> Any:
    """The cache as one, for what needs all heads and slots at a time."""
    if isinstance(cache, PromptCache):
        return dataclasses.replace(cache, base=whole(cache.base))
    return getattr(cache, "inner", cache)


def split_again(like: Any, cache: Any, window: int | None) -> Any:
    """What became of `whole`, spread as before."""
    if isinstance(like, SplitHeads):
        return SplitHeads(place(cache, like.layout), like.layout, like.copies)
    return SplitSlots.create(cache, like.layout, window) if isinstance(like, SplitSlots) else cache


def _place_whole(cache: Any, layout: Layout) -> Any:
    """A cache that only its sequences split."""
    if not isinstance(cache, PromptCache):
        return place(cache, layout)
    return dataclasses.replace(
        cache, base=place(cache.base, layout), expanded=place(cache.expanded, layout)
    )
