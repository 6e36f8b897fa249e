"""Uncompressed caches: every token in a slot, as keys and values or as latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand, cached_attention
from kvjax.cache.storage import empty, live_slots, query_slots, token_slots, write_pool, write_rows
from kvjax.config import AttentionConfig
from pallas_kernels import dequantize, gqa_decode, mla_decode


@flax.struct.dataclass
class DenseCache:
    """Keys and values (or latents), in the order of time.

    Attributes:
        k, v: [B, K, S, ·] arrays or `Quantized`; S tokens fit.
        lengths: [B] int32, tokens given so far; what does not fit is dropped.
        evicted: [B] int32, tokens of the prompt that were not kept; None for none.
        positions: [B, S] int32 of the entries, −1 for none; None where the slot is the position.
    """

    k: Any
    v: Any
    lengths: Any
    evicted: Any = None
    positions: Any = None

    @classmethod
    def create(
        cls, batch: int, heads: int, capacity: int, key_dim: int, value_dim: int, dtype
    ) -> DenseCache:
        """An empty cache for `capacity` tokens a sequence."""
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
        """[B] slots given out, beyond S where tokens were dropped."""
        return self.lengths if self.evicted is None else self.lengths - self.evicted

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """Stores the new entries [B, T, K, ·] where position ≥ 0."""
        S = self.k.shape[2]
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
        with jax.named_scope("attend"):
            if q.shape[1] == 1 and expand is None and self.positions is None:
                settings = {"scale": spec.scale, "window": spec.window, "softcap": spec.softcap}
                return gqa_decode(q[:, 0], cache.k, cache.v, live, **settings)[:, None], cache
            if cache.positions is None:
                at, held = query_slots(self.used, positions), live_slots(live, S)
            else:
                at, held = positions, cache.positions
            out, _ = cached_attention(q, cache.k, cache.v, at, held, spec, expand)
            return out.astype(q.dtype), cache

    def keys_and_values(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """[B, K, S, ·] what queries meet, and what is weighed; in their own dtype for None."""
        return dequantize(self.k, dtype or self.k.dtype), dequantize(self.v, dtype or self.v.dtype)


@flax.struct.dataclass
class LatentCache:
    """Latents and rotary keys, in the order of time.

    Attributes:
        latent, k_rope: [B, S, L] and [B, S, R], arrays or `Quantized`; on TPUs with zeros up to
            whole lanes, see `stored_width`.
        lengths: [B] int32, tokens given so far; what does not fit is dropped.
        evicted: [B] int32, tokens of the prompt that were not kept; None for none.
        positions: [B, S] int32 of the entries, −1 for none, where a sliding window must know them
            because tokens were not kept; None where the slot tells.
    """

    latent: Any
    k_rope: Any
    lengths: Any
    evicted: Any = None
    positions: Any = None

    @classmethod
    def create(cls, batch: int, capacity: int, rank: int, rope_dim: int, dtype) -> LatentCache:
        """An empty cache for `capacity` tokens a sequence."""
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
        """[B] slots given out, beyond S where tokens were dropped."""
        return self.lengths if self.evicted is None else self.lengths - self.evicted

    def append(self, latent: jax.Array, k_rope: jax.Array, positions: jax.Array) -> LatentCache:
        """Stores the new entries [B, T, L] and [B, T, R] where position ≥ 0."""
        where, used = token_slots(self.used, positions, self.latent.shape[1])

        def write(buffer, new):
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
            [B, T, N, L] attention-weighted latents, before the value up-projection; the cache.
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
        """Attends over what is held, the new entries included; stores nothing.

        Args:
            before: [B] slots given out before these queries' own tokens. Where this is a part of
                all slots, those of later numbers, it is less by as many as come before the part,
                as `used` is, and may be negative. A sliding window then needs `positions`.

        Returns:
            Attention-weighted latents and logsumexp; 0 and −1e30 for queries that see nothing.
        """
        S, L = self.latent.shape[1], q_latent.shape[-1]
        live = jnp.clip(self.used, 0, S)
        with jax.named_scope("attend"):
            q_latent = widened(q_latent, self.latent.shape[-1])
            q_rope = widened(q_rope, self.k_rope.shape[-1])
            if q_latent.shape[1] == 1 and self.positions is None:
                out, lse = mla_decode(
                    q_latent[:, 0],
                    q_rope[:, 0],
                    self.latent,
                    self.k_rope,
                    live,
                    spec.scale,
                    window=spec.window,
                    softcap=spec.softcap,
                    return_lse=True,
                )
                return out[:, None, :, :L], lse[:, None]
            q = self.joint(q_latent, q_rope)
            keys, values = self.keys_and_values(q.dtype)
            if self.positions is None:
                at, held = query_slots(before, positions), live_slots(live, S)
            else:
                at, held = positions, self.positions
            out, lse = cached_attention(q, keys, values, at, held, spec)
            return out[..., :L], lse

    def joint(
        self, q_latent: Float[Array, "B T N L"], q_rope: Float[Array, "B T N R"]
    ) -> Float[Array, "B T N X"]:
        """Queries that meet the keys of `keys_and_values`."""
        parts = widened(q_latent, self.latent.shape[-1]), widened(q_rope, self.k_rope.shape[-1])
        return jnp.concatenate(parts, axis=-1)

    def keys_and_values(
        self, dtype: Any
    ) -> tuple[Float[Array, "B 1 S X"], Float[Array, "B 1 S L"]]:
        """Latents beside rotary keys, and latents: what a head with all of both would cache."""
        latent = dequantize(self.latent, dtype)[:, None]
        return jnp.concatenate([latent, dequantize(self.k_rope, dtype)[:, None]], axis=-1), latent


def stored_width(width: int, platform: str | None = None) -> int:
    """Numbers that a width takes in memory: whole lanes of 128 on TPUs, which pad them anyway.

    Of other widths XLA:TPU makes the slots the minor dimension, and copies a cache for every kernel
    that reads its rows (a third of a cache's bytes a layer in temporaries, at 448 + 64).

    Args:
        platform: of the devices; None for the default ones'.
    """
    lanes = 128 if (platform or jax.default_backend()) == "tpu" else 1
    return -(-width // lanes) * lanes


def widened(x: jax.Array, width: int) -> jax.Array:
    """Zeros behind the last axis, up to `width`."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))


def new_cache(
    attention: AttentionConfig, batch: int, capacity: int, dtype: Any
) -> DenseCache | LatentCache:
    """An empty cache of the kind that this attention fills, for `capacity` tokens a sequence."""
    widths, dtype = attention.cached_widths, jnp.dtype(dtype)
    if attention.shared_latent:
        return LatentCache.create(batch, capacity, *widths, dtype)
    return DenseCache.create(batch, attention.cached_heads, capacity, *widths, dtype)
