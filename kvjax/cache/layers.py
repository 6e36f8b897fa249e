"""The model's view of its caches: the contract of one layer's cache (`Cache`), and the caches of
all layers (`ModelCache`), which prefill creates and every decoding step takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache.attention import AttentionSpec, Expand
from kvjax.cache.pool import Pool, PoolLayer
from kvjax.cache.sharded import ShardedHeads, device_spec, place, specs
from kvjax.cache.storage import where_live
from kvjax.mesh import Placement
from pallas_kernels import schedule


@runtime_checkable
class Cache(Protocol):
    """Keys and values of one layer.

    Caches are pytrees, and jax also puts shapes, shardings and markers in the places of their
    arrays. The fields are therefore annotated Any, and the docstrings give the shapes.

    `lengths` [B] counts the tokens that a sequence has given to the cache. Tokens beyond `capacity`
    are counted but not stored, so lengths > capacity tells that tokens were dropped.
    """

    @property
    def lengths(self) -> jax.Array: ...

    @property
    def capacity(self) -> int | jax.Array:
        """Tokens that a sequence can give to this cache in total; [B] where sequences differ."""
        ...

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[jax.Array, Any]:
        """Stores the new entries and attends.

        Args:
            q: [B, T, N, H] queries, rotated.
            k, v: [B, T, K, ·] new entries: rotated keys and values, or latents.
            positions: [B, T] int32; −1 marks padding, which is neither stored nor attended to.
            spec: scale, window, soft-cap.
            expand: rebuilds keys from the entries of a cache that stores latents.

        Returns:
            [B, T, N, Hv] in q's dtype, and the cache with the new entries.

        Raises:
            NotImplementedError: this cache cannot hold entries of this kind; the message says why.
        """
        ...


@runtime_checkable
class AbsorbedCache(Protocol):
    """A cache of latents that all heads share, for multi-head latent attention."""

    @property
    def lengths(self) -> jax.Array: ...

    def attend_absorbed(
        self,
        q_latent: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        positions: jax.Array,
        spec: AttentionSpec,
    ) -> tuple[jax.Array, Any]:
        """Stores the new latents [B, T, L] and rotary keys [B, T, R] and attends in the latent
        space (arXiv 2405.04434, section 2.1).

        Args:
            q_latent, q_rope: [B, T, N, L] and [B, T, N, R].

        Returns:
            [B, T, N, L] attention-weighted latents, before the value up-projection, and the cache.
        """
        ...


def cache_bytes(cache: Any) -> int:
    """Bytes of all arrays of a cache, or of a list of caches."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@flax.struct.dataclass
class ModelCache:
    """The caches of all layers; `cache[3]` is the cache of the fourth layer.

    Attributes:
        own: for each layer its cache; None for a layer whose heads have budgets in a pool.
        pools: the pools; layers of one shape share a pool.
        rope_lengths: [B] int32, length of the prompt plus the tokens to generate. RoPE rules that
            depend on the length read it.
        places: for each layer the number of its pool and its row in the pool's tables; None for a
            layer whose cache is in `own`.
        placement: how the pools are sharded over a mesh; None for one device.
        copies: see `ShardedHeads`.
    """

    own: tuple[Any, ...]
    pools: tuple[Pool, ...]
    rope_lengths: Any
    places: tuple[tuple[int, int] | None, ...] = flax.struct.field(pytree_node=False)
    placement: Placement | None = flax.struct.field(pytree_node=False, default=None)
    copies: int = flax.struct.field(pytree_node=False, default=1)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: int) -> Any:
        place = self.places[index]
        if place is None:
            return self.own[index]
        layer = self.pools[place[0]].layer(place[1])
        return layer if self.placement is None else ShardedHeads(layer, self.placement, self.copies)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> jax.Array:
        """[B] int32, tokens that each sequence has given; also the next token's position."""
        return self[0].lengths

    @property
    def capacity(self) -> Any:
        """Tokens that a sequence can give in total; [B] where sequences differ."""
        held = [cache for cache in self.own if cache is not None] + list(self.pools)
        return held[0].capacity if len(held) == 1 else min_capacity(held)

    def with_layer(self, index: int, cache: Any) -> ModelCache:
        """The caches with layer `index` replaced by `cache`."""
        place = self.places[index]
        if place is None:
            own = (*self.own[:index], cache, *self.own[index + 1 :])
            return dataclasses.replace(self, own=own)
        return self.with_pool_layer(place, cache if self.placement is None else cache.inner)

    def with_pool_layer(self, place: tuple[int, int], layer: PoolLayer) -> ModelCache:
        """The caches with one layer of a pool replaced.

        Args:
            place: number of the pool and row of the layer, see `places`.
            layer: the layer as the devices store it: without `ShardedHeads` around it.
        """
        number, row = place
        pool = self.pools[number].with_layer(row, layer)
        pools = (*self.pools[:number], pool, *self.pools[number + 1 :])
        return dataclasses.replace(self, pools=pools)

    def advance(self, lengths: jax.Array) -> ModelCache:
        """The caches after a step: pools count the new tokens, as single layers already did."""
        # Each pool needs a separate array: the next step donates them, and jax donates none twice.
        own = (lengths, *(lengths + 0 for _ in self.pools[1:]))
        pools = tuple(
            dataclasses.replace(pool, lengths=each, schedule=None)
            for pool, each in zip(self.pools, own, strict=False)
        )
        return dataclasses.replace(self, pools=pools)


@functools.partial(jax.jit, static_argnums=tuple(range(8)))
def new_pool(
    shape: tuple[int, int, int],
    rows: int,
    widths: tuple[int, int],
    dtype: str,
    positions: bool,
    align: int,
    span: int | None,
    placement: Placement | None,
    lengths: Int[Array, " B"],
) -> Pool:
    """`Pool.empty`, sharded over the mesh of `placement`."""
    platform = None if placement is None else placement.platform
    pool = Pool.empty(shape, rows, widths, dtype, lengths, positions, align, span, platform)
    return pool if placement is None else place(pool, placement)


def min_capacity(caches: list[Any]) -> jax.Array:
    """[B] the smallest capacity among several caches."""
    batch = caches[0].lengths.shape[0]
    each = [jnp.broadcast_to(jnp.asarray(cache.capacity), (batch,)) for cache in caches]
    return jnp.min(jnp.stack(each), axis=0)


@singledispatch
def with_layer(caches: Any, index: int, cache: Any) -> Any:
    """The caches of all layers with layer `index` replaced by `cache`."""
    return [*caches[:index], cache, *caches[index + 1 :]]


@with_layer.register
def _(caches: ModelCache, index: int, cache: Any) -> ModelCache:
    return caches.with_layer(index, cache)


@singledispatch
def advance(caches: Any, lengths: jax.Array) -> Any:
    """The caches after all layers have seen a step's tokens; `lengths` [B] are the new totals."""
    return caches


@advance.register
def _(caches: ModelCache, lengths: jax.Array) -> ModelCache:
    return caches.advance(lengths)


def without_last(caches: ModelCache, rows: Sequence[bool]) -> ModelCache:
    """The caches of a prefill, ready to take the last token of some sequences once more.

    The next token overwrites a sequence's last token. Under every policy each head has kept that
    token, as the newest of its entries, so the counts are one lower and no entry moves. The result
    shares its arrays with the given caches.

    Args:
        rows: for each sequence, whether its last token is taken back.
    """
    taken = np.asarray(rows, np.int32)

    def count(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf - taken if getattr(path[-1], "name", "") == "lengths" else leaf

    return jax.tree_util.tree_map_with_path(count, caches)


def rope_lengths_of(caches: Any) -> jax.Array:
    """[B] total length of each sequence, for RoPE rules that depend on it: the stored one, or the
    capacity for caches from `init_cache`."""
    if isinstance(caches, ModelCache):
        return caches.rope_lengths
    first = caches[0]
    return jnp.full(first.lengths.shape, first.capacity, jnp.int32)


@functools.partial(jax.jit, static_argnames=("group", "placement"))
def work_lists(
    pool: Pool, positions: Int[Array, "B 1"], *, group: int, placement: Placement | None
) -> Any:
    """The rows that the kernels of all layers read in one step; each device lists its own heads.

    Args:
        group: query heads per KV head.

    Returns:
        The lists of `pallas_kernels.schedule`.
    """

    def make(pool: Pool, positions: jax.Array) -> Any:
        # The lists include the step's own token, which each layer stores before its kernel runs.
        new = (positions[:, 0] >= 0).astype(jnp.int32)
        given = pool.kept + (pool.lengths - pool.read + new)[:, None, None]
        live = where_live(jnp.minimum(given, pool.capacities), positions)
        return schedule(
            jnp.swapaxes(pool.starts, 0, 1),
            jnp.swapaxes(live, 0, 1),
            queries_per_head=group,
            k_pool=pool.k,
            v_pool=pool.v,
            align=pool.align,
            span=pool.span,
        )

    if placement is None:
        return make(pool, positions)
    call = placement.run(
        make, (specs(pool, placement), placement.spec("batch")), device_spec(placement)
    )
    return call(pool, positions)


def scheduled(
    caches: Any, positions: Any, query_heads: Sequence[int], run: Callable[..., Any] = work_lists
) -> Any:
    """The caches with the work lists of one step; `advance` removes the lists again.

    Args:
        positions: [B, 1] positions of the step's tokens, −1 for none.
        query_heads: number of query heads of each layer.
        run: `work_lists`, or a function that returns its shapes.
    """
    if not isinstance(caches, ModelCache):
        return caches
    pools = []
    for number, pool in enumerate(caches.pools):
        own = [place is not None and place[0] == number for place in caches.places]
        counts = {heads for heads, owned in zip(query_heads, own, strict=True) if owned}
        # Pools on CPUs are not aligned and need no list. Layers of one pool that differ in their
        # query heads would need a list each, so the kernels of such a pool build them.
        if pool.align > 1 and len(counts) == 1:
            group = counts.pop() // pool.starts.shape[2]
            lists = run(pool, positions, group=group, placement=caches.placement)
            pool = dataclasses.replace(pool, schedule=lists)
        pools.append(pool)
    return dataclasses.replace(caches, pools=tuple(pools))
