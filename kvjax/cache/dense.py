"""Every KV head keeps the same tokens: all of them, or those that a token budget left."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import slots
from kvjax.cache.attention import AttentionSpec, Expand, cached_attention
from kvjax.cache.entries import empty
from pallas_kernels import dequantize, gqa_decode


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
        where, used = slots.token_slots(self.used, positions, S)
        held = self.positions
        if held is not None:
            held = slots.write_rows(held[:, None], positions[..., None], where)
            held = jax.tree.map(lambda leaf: leaf[:, 0], held)
        with jax.named_scope("cache_update"):
            return dataclasses.replace(
                self,
                k=slots.write_rows(self.k, k, where),
                v=slots.write_rows(self.v, v, where),
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
                at, held = slots.query_slots(self.used, positions), slots.live_slots(live, S)
            else:
                at, held = positions, cache.positions
            out, _ = cached_attention(q, cache.k, cache.v, at, held, spec, expand)
            return out.astype(q.dtype), cache

    def keys_and_values(self, dtype: Any = None) -> tuple[jax.Array, jax.Array]:
        """[B, K, S, ·] what queries meet, and what is weighed; in their own dtype for None."""
        return dequantize(self.k, dtype or self.k.dtype), dequantize(self.v, dtype or self.v.dtype)
