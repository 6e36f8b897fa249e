"""Caches sharded over the devices of a mesh: each device stores and attends to its own part.

The part of a device is an ordinary cache; this module cuts queries and new entries to fit it.
Sharded heads need no communication. Latents have no heads, so their slots are sharded: every device
attends with all queries to its slots, and the partial results are merged by their logsumexp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand
from kvjax.cache.dense import DenseCache, LatentCache, PrefillCache, stored_width, widened
from kvjax.cache.pool import Pool, PoolLayer
from kvjax.cache.storage import slot_tile
from kvjax.config import AttentionConfig
from kvjax.mesh import Placement
from pallas_kernels.packed import Packed
from pallas_kernels.plan import exchange


@functools.singledispatch
def specs(cache: Any, placement: Placement) -> Any:
    """How a cache's arrays are sharded: the cache with a `PartitionSpec` in place of each array."""
    raise TypeError(f"a {type(cache).__name__} cannot be sharded")


@specs.register
def _(cache: DenseCache, placement: Placement) -> DenseCache:
    heads, rows = placement.spec("batch", "tensor"), placement.spec("batch")
    return _with_specs(cache, dict.fromkeys(("k", "v", "channels"), heads), rows)


@specs.register
def _(cache: LatentCache, placement: Placement) -> LatentCache:
    slots, rows = placement.spec("batch", "tensor"), placement.spec("batch")
    return _with_specs(cache, dict.fromkeys(("latent", "k_rope", "positions"), slots), rows)


@specs.register
def _(cache: Pool, placement: Placement) -> Pool:
    rows, heads = placement.spec("batch", "tensor"), placement.spec("batch", None, "tensor")
    own: dict[str, PartitionSpec] = {"schedule": device_spec(placement)}
    tables = ("starts", "capacities", "kept", "rings", "queries", "channels")
    own |= dict.fromkeys(tables, heads)
    own |= dict.fromkeys(("lengths", "read"), placement.spec("batch"))
    return _with_specs(cache, own, rows)


@specs.register
def _(cache: PoolLayer, placement: Placement) -> PoolLayer:
    queries = None if cache.queries is None else placement.spec("batch", None, "tensor")
    return PoolLayer(specs(cache.pool, placement), placement.spec(), queries)


def device_spec(placement: Placement) -> PartitionSpec:
    """The spec of arrays [L, …] that differ between all devices."""
    axes = (*placement.batch, *([] if placement.tensor is None else [placement.tensor]))
    return PartitionSpec(None, axes or None)


def _with_specs(cache: Any, own: dict[str, PartitionSpec], rest: PartitionSpec) -> Any:
    """The cache with a spec for every field that is not None; a quantized array needs only one."""
    arrays = (f for f in dataclasses.fields(cache) if f.metadata.get("pytree_node", True))
    fields = [field.name for field in arrays]
    present = [name for name in fields if getattr(cache, name) is not None]
    return dataclasses.replace(cache, **{name: own.get(name, rest) for name in present})


def place(cache: Any, placement: Placement) -> Any:
    """The cache with its arrays constrained to their shardings."""
    return with_shardings(
        jax.lax.with_sharding_constraint, specs(cache, placement), cache, placement.mesh
    )


def with_shardings(function: Callable[[Any, Any], Any], parts: Any, cache: Any, mesh: Any) -> Any:
    """Applies function(array, sharding) to every array of a cache; `parts` are its `specs`."""

    def put(spec: PartitionSpec, part: Any) -> Any:
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: function(x, sharding), part)

    return jax.tree.map(put, parts, cache, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


@flax.struct.dataclass
class ShardedHeads:
    """A cache whose sequences and KV heads are sharded over devices.

    Attributes:
        inner: the cache of all heads, each repeated `copies` times. A pool has the rows of the
            first device, then the rows of the second, and so on.
        placement: the mesh axes of sequences and heads.
        copies: number of devices that hold the same KV head, for more devices than heads.
    """

    inner: Any
    placement: Placement = flax.struct.field(pytree_node=False)
    copies: int = flax.struct.field(pytree_node=False, default=1)

    @classmethod
    def create(cls, cache: DenseCache, placement: Placement) -> ShardedHeads:
        """Shards an empty cache.

        Raises:
            ValueError: neither of the numbers of heads and devices divides the other.
        """
        copies = head_copies(cache.k.shape[1], placement.ways)
        more = -cache.k.shape[2] % slot_tile(placement.platform)

        def spread(leaf: jax.Array) -> jax.Array:
            leaf = jnp.pad(leaf, ((0, 0), (0, 0), (0, more), *((0, 0),) * (leaf.ndim - 3)))
            return jnp.repeat(leaf, copies, axis=1) if copies > 1 else leaf

        if copies > 1 or more:
            k, v = jax.tree.map(spread, (cache.k, cache.v))
            channels = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=1), cache.channels)
            cache = dataclasses.replace(cache, k=k, v=v, channels=channels)
        return cls(place(cache, placement), placement, copies)

    @property
    def lengths(self) -> jax.Array:
        return self.inner.lengths

    @property
    def capacity(self) -> int | jax.Array:
        return self.inner.capacity

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], ShardedHeads]:
        """See `Cache.attend`.

        Raises:
            NotImplementedError: keys are to be rebuilt from latents with `expand`.
            ValueError: the devices do not divide the query heads.
        """
        if expand is not None:
            raise NotImplementedError("keys of latents are rebuilt on all devices, not by heads")
        check_query_heads(q.shape[2], self.placement)
        # A device with a copy of a head stores that head's entries too.
        if self.copies > 1:
            k, v = (jnp.repeat(x, self.copies, axis=2) for x in (k, v))

        placement = self.placement

        def run(cache, q, k, v, positions):
            return cache.attend(q, k, v, positions, spec)

        heads, rows = placement.spec("batch", None, "tensor"), placement.spec("batch")
        parts = specs(self.inner, placement)
        call = placement.run(run, (parts, heads, heads, heads, rows), (heads, parts))
        out, inner = call(self.inner, q, k, v, positions)
        return out, dataclasses.replace(self, inner=inner)

    def keys_and_values(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, ·] of an uncompressed cache, without the copies of heads."""
        keys, values = self.inner.keys_and_values(dtype)
        return keys[:, :: self.copies], values[:, :: self.copies]


@flax.struct.dataclass
class ShardedSlots:
    """Latents whose sequences and slots are sharded: each device holds consecutive slots.

    Attributes:
        inner: the cache of all slots. Each device holds the same number of whole tiles.
        placement: the mesh axes of sequences and slots.
    """

    inner: LatentCache
    placement: Placement = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, cache: LatentCache, placement: Placement, window: int | None) -> ShardedSlots:
        """Shards a cache; `window` is the layer's sliding window."""
        B, S = cache.latent.shape[:2]
        if window is not None and cache.positions is None and placement.ways > 1:
            # A window may begin on another device, so slots need their positions.
            cache = dataclasses.replace(cache, positions=jnp.full((B, S), -1, jnp.int32))

        # Pad so that every device gets whole tiles of slots.
        whole = placement.ways * slot_tile(placement.platform)

        def pad(leaf: jax.Array, value: int = 0) -> jax.Array:
            rooms = ((0, 0), (0, -S % whole), *((0, 0),) * (leaf.ndim - 2))
            return jnp.pad(leaf, rooms, constant_values=value)

        def lanes(leaf: jax.Array) -> jax.Array:
            wide = leaf.ndim == 3  # scales of 8-bit entries are one number per slot
            return widened(leaf, stored_width(leaf.shape[-1], placement.platform)) if wide else leaf

        # No kernel reads packed rows, so they need no whole lanes.
        latent, k_rope = (
            jax.tree.map(pad, part if isinstance(part, Packed) else jax.tree.map(lanes, part))
            for part in (cache.latent, cache.k_rope)
        )
        positions = None if cache.positions is None else pad(cache.positions, -1)
        cache = dataclasses.replace(cache, latent=latent, k_rope=k_rope, positions=positions)
        return cls(place(cache, placement), placement)

    @property
    def lengths(self) -> jax.Array:
        return self.inner.lengths

    @property
    def capacity(self) -> int | jax.Array:
        return self.inner.capacity

    def attend_absorbed(
        self,
        q_latent: Float[Array, "B T N L"],
        q_rope: Float[Array, "B T N R"],
        latent: Float[Array, "B T L"],
        k_rope: Float[Array, "B T R"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N L"], ShardedSlots]:
        """See `LatentCache.attend_absorbed`.

        Raises:
            ValueError: the devices do not divide the query heads.
        """
        placement = self.placement
        check_query_heads(q_latent.shape[2], placement)

        def run(cache, q_latent, q_rope, latent, k_rope, positions):
            # Count slots from this device's first one: tokens for other devices then fall outside.
            first = placement.device() * cache.latent.shape[1]
            part = dataclasses.replace(cache, lengths=cache.lengths - first)
            before, part = part.used, part.append(latent, k_rope, positions)
            # Every device needs all query heads for its slots; `exchange` returns each device's
            # heads.
            q_latent, q_rope = gather_heads(q_latent, q_rope, placement)
            out, lse = part.attend_held(q_latent, q_rope, positions, before, spec)
            if placement.tensor is not None:
                out = exchange(out, lse, placement.tensor, axis=2)
            return out.astype(q_latent.dtype), dataclasses.replace(
                part, lengths=part.lengths + first
            )

        heads, rows = placement.spec("batch", None, "tensor"), placement.spec("batch")
        parts = specs(self.inner, placement)
        call = placement.run(run, (parts, heads, heads, rows, rows, rows), (heads, parts))
        out, inner = call(self.inner, q_latent, q_rope, latent, k_rope, positions)
        return out, dataclasses.replace(self, inner=inner)

    def keys_and_values(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """See `LatentCache.keys_and_values`."""
        return self.inner.keys_and_values(dtype)

    def joint(
        self, q_latent: Float[Array, "B T N L"], q_rope: Float[Array, "B T N R"]
    ) -> Float[Array, "B T N X"]:
        """See `LatentCache.joint`."""
        return self.inner.joint(q_latent, q_rope)


def head_copies(heads: int, devices: int) -> int:
    """How many devices hold the same KV head: 1 unless there are more devices than heads.

    Raises:
        ValueError: neither number divides the other.
    """
    if heads % devices and devices % heads:
        raise ValueError(
            f"got {heads} KV heads over {devices} devices of the tensor axis, expected that one "
            "divides the other"
        )
    return max(devices // heads, 1)


def check_query_heads(heads: int, placement: Placement) -> None:
    """Raises ValueError unless the devices divide the query heads."""
    if heads % placement.ways:
        raise ValueError(
            f"got {heads} query heads over {placement.ways} devices, expected a multiple"
        )


def gather_heads(
    q_latent: Float[Array, "B T n L"], q_rope: Float[Array, "B T n R"], placement: Placement
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N R"]]:
    """The query heads of all devices."""
    if placement.tensor is None:
        return q_latent, q_rope
    both = jnp.concatenate([q_latent, q_rope], axis=-1)
    every = jax.lax.all_gather(both, placement.tensor, axis=2, tiled=True)
    return every[..., : q_latent.shape[-1]], every[..., q_latent.shape[-1] :]


@functools.singledispatch
def places(cache: Any) -> tuple[Any, Placement]:
    """The specs of a sharded cache, and its placement.

    Raises:
        TypeError: the cache is not sharded.
    """
    raise TypeError(f"a {type(cache).__name__} is not sharded")


@places.register
def _(cache: ShardedHeads) -> tuple[Any, Placement]:
    return dataclasses.replace(cache, inner=specs(cache.inner, cache.placement)), cache.placement


@places.register
def _(cache: ShardedSlots) -> tuple[Any, Placement]:
    return dataclasses.replace(cache, inner=specs(cache.inner, cache.placement)), cache.placement


@functools.singledispatch
def spread(cache: Any, placement: Placement, window: int | None) -> Any:
    """Shards an empty cache over a mesh.

    Raises:
        ValueError: neither of the numbers of KV heads and tensor devices divides the other.
        NotImplementedError: a scorer watches the prompt, and there are more devices than KV heads.
    """
    raise TypeError(f"a {type(cache).__name__} cannot be sharded")


@spread.register
def _(cache: DenseCache, placement: Placement, window: int | None) -> ShardedHeads:
    return ShardedHeads.create(cache, placement)


@spread.register
def _(cache: LatentCache, placement: Placement, window: int | None) -> ShardedSlots:
    return ShardedSlots.create(cache, placement, window)


@spread.register
def _(cache: PrefillCache, placement: Placement, window: int | None) -> PrefillCache:
    base = spread(cache.base, placement, window)
    if cache.observers and getattr(base, "copies", 1) > 1:
        raise NotImplementedError(
            f"{type(cache.observers[0]).__name__} watches the queries of whole groups, which "
            f"{placement.ways} devices along the tensor axis share: expected at most as many "
            "devices as KV heads"
        )
    if isinstance(base, ShardedSlots):
        width = base.inner.latent.shape[-1] + base.inner.k_rope.shape[-1]
        return dataclasses.replace(cache, base=base, queries=widened(cache.queries, width))
    return dataclasses.replace(cache, base=base)


def spread_layer(attention: AttentionConfig, cache: Any, placement: Placement) -> Any:
    """Shards one layer's cache, with or without entries, over a mesh.

    Keys that are rebuilt from latents in every step have neither heads nor slots to shard: every
    device along the tensor axis holds all of them.
    """
    if attention.rebuilds_keys:
        return place(cache, placement.of_batch())
    return spread(cache, placement, attention.spec.window)


def spread_prefill(
    attention: AttentionConfig, cache: PrefillCache, placement: Placement
) -> PrefillCache:
    """Shards the empty cache of a prompt over a mesh.

    Raises:
        ValueError, NotImplementedError: see `spread`.
    """
    if not attention.rebuilds_keys:
        return spread(cache, placement, attention.spec.window)
    # Rebuilt keys have neither heads nor slots to shard: each device of the tensor axis has all.
    whole = placement.of_batch()
    base, expanded = place(cache.base, whole), place(cache.expanded, whole)
    return dataclasses.replace(cache, base=base, expanded=expanded)
