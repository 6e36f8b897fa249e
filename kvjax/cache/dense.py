"""Uncompressed caches: each token has a slot, with keys and values or with a latent.

`PrefillCache` holds one layer's prompt while prefill reads it; compression takes it as input.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand, cached_attention
from kvjax.cache.channels import KeyChannels
from kvjax.cache.storage import (
    cast,
    last_queries,
    query_slots,
    slot_numbers,
    token_slots,
    where_live,
    write_pool,
    write_rows,
)
from kvjax.config import AttentionConfig
from pallas_kernels import dequantize, gqa_decode, mla_decode
from pallas_kernels.entries import empty, is_quantized


@flax.struct.dataclass
class DenseCache:
    """Keys and values (or latents) in the order of the tokens.

    Attributes:
        k, v: [B, K, S, ·] entries, with room for S tokens.
        lengths: [B] int32, tokens that each sequence has given so far. Tokens that do not fit are
            counted but not stored.
        evicted: [B] int32, tokens of the prompt that compression removed; None for none.
        positions: [B, S] int32 position of each entry, −1 for empty slots; None where the slot
            number is the position.
        channels: how the stored keys are normalised; None if they are not.
    """

    k: Any
    v: Any
    lengths: Any
    evicted: Any = None
    positions: Any = None
    channels: Any = None

    @classmethod
    def create(
        cls, batch: int, heads: int, capacity: int, key_dim: int, value_dim: int, dtype
    ) -> DenseCache:
        """An empty cache for `capacity` tokens per sequence."""
        return cls(
            k=empty((batch, heads, capacity, key_dim), dtype),
            v=empty((batch, heads, capacity, value_dim), dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int | jax.Array:
        return self.k.shape[2] if self.evicted is None else self.k.shape[2] + self.evicted

    @property
    def used(self) -> jax.Array:
        """[B] int32, slots assigned so far. Exceeds S where tokens were dropped."""
        return self.lengths if self.evicted is None else self.lengths - self.evicted

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """Stores the new entries [B, T, K, ·], except at position −1 (padding)."""
        S = self.k.shape[2]
        if self.channels is not None:
            k = self.channels.normalised(k, axis=1)
        where, used = token_slots(self.used, positions, S)
        held = self.positions
        if held is not None:
            held = write_rows(held[:, None], positions[..., None], where)
            held = jax.tree.map(lambda leaf: leaf[:, 0], held)
        with jax.named_scope("cache_update"):
            return dataclasses.replace(
                self,
                k=write_rows(self.k, k, where),
                v=write_rows(self.v, v, where),
                lengths=self.lengths + used - self.used,
                positions=held,
            )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T M Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], DenseCache]:
        """See `Cache.attend`."""
        cache = self.append(k, v, positions)
        S = self.k.shape[2]
        live = jnp.minimum(cache.used, S)
        if self.channels is not None:
            if expand is None:
                q = self.channels.queries(q)
            else:
                expand = self._restoring(expand)
        with jax.named_scope("attend"):
            # One token per sequence: the decode kernel, which takes slots for positions.
            if q.shape[1] == 1 and expand is None and self.positions is None:
                settings = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
                read = where_live(live, positions)
                return gqa_decode(q[:, 0], cache.k, cache.v, read, **settings)[:, None], cache
            # Only differences of positions count, so slot numbers work if no token was removed.
            if cache.positions is None:
                at, held = query_slots(self.used, positions), slot_numbers(live, S)
            else:
                at, held = positions, cache.positions
            out, _ = cached_attention(q, cache.k, cache.v, at, held, spec, expand)
            return out.astype(q.dtype), cache

    def _restoring(self, expand: Expand) -> Expand:
        """`expand` for keys as they are stored."""
        channels = self.channels
        return lambda keys, positions: expand(channels.restored(keys, axis=1), positions)

    def keys_and_values(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, ·] as floats; `dtype` None keeps the dtype of the cache."""
        k, v = dequantize(self.k, dtype or self.k.dtype), dequantize(self.v, dtype or self.v.dtype)
        return (k if self.channels is None else self.channels.restored(k, axis=2)), v

    def cast(self, dtype: str | None, live: Bool[Array, "B S"], spec: AttentionSpec) -> DenseCache:
        """The cache with its entries in the format of `dtype`; unchanged for None.

        Args:
            live: slots that hold tokens; keys in 8 or 4 bits are normalised by those.
        """
        k, channels = self.k, self.channels
        if dtype is not None and is_quantized(dtype):
            channels = KeyChannels.of_prompt(k, live[:, None], spec)
            k = channels.normalised(k, axis=2)
        k, v = cast(k, dtype), cast(self.v, dtype)
        return dataclasses.replace(self, k=k, v=v, channels=channels)


@flax.struct.dataclass
class LatentCache:
    """Latents and rotary keys, in the order of the tokens.

    Attributes:
        latent, k_rope: [B, S, L] and [B, S, R] entries. On TPUs zeros pad the last
            axis to whole lanes, see `stored_width`.
        lengths: [B] int32, tokens that each sequence has given so far. Tokens that do not fit are
            counted but not stored.
        evicted: [B] int32, tokens of the prompt that compression removed; None for none.
        positions: [B, S] int32 position of each entry, −1 for empty slots. A sliding window needs
            them after tokens were removed; None where the slot number is enough.
    """

    latent: Any
    k_rope: Any
    lengths: Any
    evicted: Any = None
    positions: Any = None

    @classmethod
    def create(cls, batch: int, capacity: int, rank: int, rope_dim: int, dtype) -> LatentCache:
        """An empty cache for `capacity` tokens per sequence."""
        return cls(
            latent=empty((batch, capacity, stored_width(rank)), dtype),
            k_rope=empty((batch, capacity, stored_width(rope_dim)), dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int | jax.Array:
        return self.latent.shape[1] if self.evicted is None else self.latent.shape[1] + self.evicted

    @property
    def used(self) -> jax.Array:
        """[B] int32, slots assigned so far. Exceeds S where tokens were dropped."""
        return self.lengths if self.evicted is None else self.lengths - self.evicted

    def cast(self, dtype: str | None, live: Bool[Array, "B S"], spec: AttentionSpec) -> LatentCache:
        """See `DenseCache.cast`. Latents are not normalised: they are keys and values at once."""
        latent, k_rope = cast(self.latent, dtype), cast(self.k_rope, dtype)
        return dataclasses.replace(self, latent=latent, k_rope=k_rope)

    def append(self, latent: jax.Array, k_rope: jax.Array, positions: jax.Array) -> LatentCache:
        """Stores the new entries [B, T, L] and [B, T, R], except at position −1 (padding)."""
        where, used = token_slots(self.used, positions, self.latent.shape[1])

        def write(buffer, new):
            # `write_pool` takes rows without an axis of heads; the latents count as one head.
            new = widened(new, buffer.shape[-1])
            return write_pool(buffer, new[:, :, None], where[:, :, None])

        held = self.positions
        if held is not None:
            written: Any = write(held[..., None], positions[..., None])
            held = written[..., 0]
        with jax.named_scope("cache_update"):
            return dataclasses.replace(
                self,
                latent=write(self.latent, latent),
                k_rope=write(self.k_rope, k_rope),
                lengths=self.lengths + used - self.used,
                positions=held,
            )

    def attend_absorbed(
        self,
        q_latent: Float[Array, "B T N L"],
        q_rope: Float[Array, "B T N R"],
        latent: Float[Array, "B T L"],
        k_rope: Float[Array, "B T R"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N L"], LatentCache]:
        """Stores the new entries and attends in the latent space (arXiv 2405.04434, section 2.1).

        Returns:
            [B, T, N, L] attention-weighted latents, before the value up-projection, and the cache.
        """
        cache = self.append(latent, k_rope, positions)
        out, _ = cache.attend_held(q_latent, q_rope, positions, self.used, spec)
        return out.astype(q_latent.dtype), cache

    def attend_held(
        self,
        q_latent: Float[Array, "B T N L"],
        q_rope: Float[Array, "B T N R"],
        positions: Int[Array, "B T"],
        before: Int[Array, " B"],
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
        """Attends over the stored entries, the queries' own included. Stores nothing.

        Args:
            before: [B] number of slots already used when these queries arrived. On a mesh each
                device counts from its own first slot, so the number can be negative; a sliding
                window then needs `positions`.

        Returns:
            Attention-weighted latents and logsumexp; 0 and −1e30 for queries that see no key.
        """
        S, L = self.latent.shape[1], q_latent.shape[-1]
        live = jnp.clip(self.used, 0, S)
        with jax.named_scope("attend"):
            # The cache may be padded to whole lanes; zeros in the queries leave the products as
            # they are.
            q_latent = widened(q_latent, self.latent.shape[-1])
            q_rope = widened(q_rope, self.k_rope.shape[-1])
            if q_latent.shape[1] == 1 and self.positions is None:
                out, lse = mla_decode(
                    q_latent[:, 0],
                    q_rope[:, 0],
                    self.latent,
                    self.k_rope,
                    where_live(live, positions),
                    spec.scale,
                    window=spec.window,
                    softcap=spec.softcap,
                    return_lse=True,
                )
                return out[:, None, :, :L], lse[:, None]
            # Several tokens: one KV head whose key is the latent joined with the rotary key.
            q = self.joint(q_latent, q_rope)
            keys, values = self.keys_and_values(q.dtype)
            if self.positions is None:
                at, held = query_slots(before, positions), slot_numbers(live, S)
            else:
                at, held = positions, self.positions
            out, lse = cached_attention(q, keys, values, at, held, spec)
            return out[..., :L], lse

    def joint(
        self, q_latent: Float[Array, "B T N L"], q_rope: Float[Array, "B T N R"]
    ) -> Float[Array, "B T N X"]:
        """Queries for the keys of `keys_and_values`: the latent part, then the rotary part."""
        parts = widened(q_latent, self.latent.shape[-1]), widened(q_rope, self.k_rope.shape[-1])
        return jnp.concatenate(parts, axis=-1)

    def keys_and_values(
        self, dtype: Any
    ) -> tuple[Float[Array, "B 1 S X"], Float[Array, "B 1 S L"]]:
        """The cache as one KV head: its keys are latents and rotary keys, its values latents."""
        latent = dequantize(self.latent, dtype)[:, None]
        return jnp.concatenate([latent, dequantize(self.k_rope, dtype)[:, None]], axis=-1), latent


def stored_width(width: int, platform: str | None = None) -> int:
    """Numbers that a row of this width takes in memory: on TPUs whole lanes of 128.

    TPUs pad rows to whole lanes in any case. For other widths XLA:TPU makes the slots the minor
    dimension and copies the cache for every kernel that reads rows. At 448 + 64 those temporaries
    take a third of the cache's bytes in each layer.

    Args:
        platform: platform of the devices; None for the default backend.
    """
    lanes = 128 if (platform or jax.default_backend()) == "tpu" else 1
    return -(-width // lanes) * lanes


def widened(x: jax.Array, width: int) -> jax.Array:
    """`x` with zeros appended to the last axis, up to `width`."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def new_cache(
    attention: AttentionConfig, batch: int, capacity: int, dtype: Any
) -> DenseCache | LatentCache:
    """An empty cache of the kind this attention needs, for `capacity` tokens per sequence."""
    widths, dtype = attention.cached_widths, jnp.dtype(dtype)
    if attention.shared_latent:
        return LatentCache.create(batch, capacity, *widths, dtype)
    return DenseCache.create(batch, attention.cached_heads, capacity, *widths, dtype)


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
        observed: int,
        num_heads: int,
        head_dim: int,
        dtype: Any,
        expanded: DenseCache | None = None,
        observers: tuple[Observer, ...] = (),
    ) -> PrefillCache:
        """An empty cache that keeps the last `observed` queries of `num_heads` × `head_dim`."""
        queries = jnp.zeros((base.lengths.shape[0], observed, num_heads, head_dim), dtype)
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
) -> PrefillCache:
    """An empty cache for one layer of a prompt that is compressed after prefill.

    Args:
        prompt_len: slots of each sequence.
        queries: number of last queries that the cache keeps.
        observers: see all queries of the prompt.
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
    dtype = jnp.dtype(dtype)
    return PrefillCache.create(base, queries, heads, width, dtype, expanded, observers)
