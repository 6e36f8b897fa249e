"""The cache of a prompt while prefill reads it; compression after prefill takes it as input."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand
from kvjax.cache.dense import DenseCache, LatentCache, new_cache, widened
from kvjax.cache.sharded import ShardedSlots, place, spread
from kvjax.cache.storage import last_queries
from kvjax.config import AttentionConfig
from kvjax.mesh import AnyMesh, Layout


@runtime_checkable
class Observer(Protocol):
    """Collects facts about a prompt's queries for a token scorer; hashable."""

    def start(self, q_BTNH: jax.Array, keys_BKSX: jax.Array) -> Any:
        """The initial state, for arrays of these shapes."""
        ...

    def watch(
        self,
        state: Any,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        keys_BKSX: jax.Array,
        lengths_B: jax.Array,
        spec: AttentionSpec,
    ) -> Any:
        """The state after a chunk of queries, whose keys are stored; position −1 marks padding."""
        ...


@flax.struct.dataclass
class PrefillCache:
    """One layer's prompt while it is read.

    Attributes:
        base: the uncompressed cache of the layer's keys and values, or latents.
        queries: [B, w, N, H] the last w queries of each sequence, rotated, the newest last. For
            sequences shorter than w the first rows are zeros.
        expanded: a cache of rebuilt keys [B, M, S, H], where `base` holds latents of keys.
        seen: the state of each observer; after `seen_by` the state of the chosen one.
    """

    base: Any
    queries: Any
    expanded: Any = None
    seen: Any = None
    observers: tuple[Observer, ...] = flax.struct.field(pytree_node=False, default=())

    @classmethod
    def create(
        cls,
        base: DenseCache | LatentCache,
        window: int,
        num_heads: int,
        head_dim: int,
        dtype: Any,
        expanded: DenseCache | None = None,
        observers: tuple[Observer, ...] = (),
    ) -> PrefillCache:
        """An empty cache that keeps the last `window` queries of `num_heads` × `head_dim`."""
        queries = jnp.zeros((base.lengths.shape[0], window, num_heads, head_dim), dtype)
        cache = cls(base, queries, expanded, observers=observers)
        return dataclasses.replace(
            cache, seen=tuple(o.start(queries, cache.keys) for o in observers)
        )

    @property
    def lengths(self) -> jax.Array:
        return self.base.lengths

    @property
    def capacity(self) -> int:
        return self.base.capacity

    @property
    def keys(self) -> Float[Array, "B K S X"]:
        """The keys that queries are multiplied with."""
        return self._held()[0] if self.expanded is None else self.expanded.k

    @property
    def values(self) -> Float[Array, "B K S Y"]:
        """The values, or latents of values."""
        return self._held()[1]

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], PrefillCache]:
        """See `Cache.attend`. Keys cached as latents are rebuilt once, when they arrive."""
        if expand is None:
            out, base = self.base.attend(q, k, v, positions, spec)
            return out, self._after(base, None, q, positions, spec)
        base = self.base.append(k, v, positions)
        # Attend with the rebuilt keys, so that a later chunk need not rebuild them.
        held = DenseCache(self.expanded.k, self.base.v, self.base.lengths)
        out, held = held.attend(q, expand(k, positions), v, positions, spec)
        expanded = dataclasses.replace(self.expanded, k=held.k, lengths=held.lengths)
        return out, self._after(base, expanded, q, positions, spec)

    def attend_absorbed(
        self,
        q_latent: Float[Array, "B T N L"],
        q_rope: Float[Array, "B T N R"],
        latent: Float[Array, "B T L"],
        k_rope: Float[Array, "B T R"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N L"], PrefillCache]:
        """See `LatentCache.attend_absorbed`."""
        out, base = self.base.attend_absorbed(q_latent, q_rope, latent, k_rope, positions, spec)
        q = self.base.joint(q_latent, q_rope)
        return out, self._after(base, None, q, positions, spec)

    def _after(self, base: Any, expanded: Any, q: Any, positions: Any, spec: Any) -> PrefillCache:
        # Observers run after the chunk is stored: their keys include the chunk's own.
        queries = last_queries(self.queries, q, positions)
        cache = dataclasses.replace(self, base=base, expanded=expanded, queries=queries)
        watched = (q, positions, cache.keys, base.lengths, spec)
        states = zip(self.observers, self.seen, strict=True)
        return dataclasses.replace(cache, seen=tuple(o.watch(s, *watched) for o, s in states))

    def seen_by(self, observer: int | None) -> PrefillCache:
        """The cache with the state of one observer, by its number; None for no state."""
        seen = None if observer is None else self.seen[observer]
        return dataclasses.replace(self, seen=seen, observers=())

    def _held(self) -> tuple[jax.Array, jax.Array]:
        return self.base.keys_and_values(self.queries.dtype)


def start_prefill(
    attention: AttentionConfig,
    batch: int,
    prompt_len: int,
    queries: int,
    dtype: Any,
    observers: tuple[Observer, ...] = (),
    mesh: AnyMesh | None = None,
) -> PrefillCache:
    """An empty cache for one layer of a prompt that is compressed after prefill.

    Args:
        prompt_len: slots of each sequence.
        queries: number of last queries that the cache keeps.
        observers: see all queries of the prompt.
        mesh: mesh that the cache is sharded over; None for one device.

    Raises:
        ValueError: neither of the numbers of KV heads and tensor devices divides the other.
        NotImplementedError: a scorer watches the prompt, and there are more devices than KV heads.
    """
    base = new_cache(attention, batch, prompt_len, dtype)
    heads, expanded = attention.query_heads, None
    # Stored queries are as wide as the keys that they are multiplied with.
    if isinstance(base, LatentCache):
        width = base.latent.shape[-1] + base.k_rope.shape[-1]
    elif attention.rebuilds_keys:
        width = attention.unconverted.cached_widths[0]
        expanded = DenseCache.create(batch, heads, prompt_len, width, 0, dtype)
    else:
        width = base.k.shape[-1]
    cache = PrefillCache.create(base, queries, heads, width, jnp.dtype(dtype), expanded, observers)
    if mesh is None:
        return cache
    layout = Layout.create(mesh, batch)
    if not attention.rebuilds_keys:
        return spread(cache, layout, attention.spec.window)
    # Rebuilt keys have neither heads nor slots to shard: each device of the tensor axis has all.
    whole = layout.of_batch()
    return dataclasses.replace(cache, base=place(base, whole), expanded=place(expanded, whole))


@spread.register
def _(cache: PrefillCache, layout: Layout, window: int | None) -> PrefillCache:
    base = spread(cache.base, layout, window)
    if cache.observers and getattr(base, "copies", 1) > 1:
        raise NotImplementedError(
            f"{type(cache.observers[0]).__name__} watches the queries of whole groups, which "
            f"{layout.ways} devices along the tensor axis share: expected at most as many devices "
            "as KV heads"
        )
    if isinstance(base, ShardedSlots):
        width = base.inner.latent.shape[-1] + base.inner.k_rope.shape[-1]
        return dataclasses.replace(cache, base=base, queries=widened(cache.queries, width))
    return dataclasses.replace(cache, base=base)
