"""The cache of multi-head latent attention: one latent and one rotary key for all heads."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import slots
from kvjax.cache.attention import AttentionSpec, causal_attention
from pallas_kernels import mla_decode


@flax.struct.dataclass
class LatentCache:
    """Latents and rotary keys of all tokens; the slot of a token is its position.

    Attributes:
        latent, k_rope: [B, S, L] and [B, S, R].
        lengths: [B] int32, tokens given so far; above S the surplus was dropped.
    """

    latent: Any
    k_rope: Any
    lengths: Any

    @classmethod
    def create(cls, batch: int, capacity: int, rank: int, rope_dim: int, dtype) -> LatentCache:
        """An empty cache for `capacity` tokens a sequence."""
        return cls(
            latent=jnp.zeros((batch, capacity, rank), dtype),
            k_rope=jnp.zeros((batch, capacity, rope_dim), dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        return self.latent.shape[1]

    def append(self, latent: jax.Array, k_rope: jax.Array, positions: jax.Array) -> LatentCache:
        """Stores the new entries [B, T, L] and [B, T, R] where position ≥ 0."""
        where, lengths = slots.token_slots(self.lengths, positions, self.capacity)

        def write(buffer, new):
            return slots.write_rows(buffer[:, None], new[:, :, None], where)[:, 0]

        with jax.named_scope("cache_update"):
            return LatentCache(write(self.latent, latent), write(self.k_rope, k_rope), lengths)

    def attend_absorbed(
        self,
        q_latent: Float[Array, "B T N L"],
        q_rope: Float[Array, "B T N R"],
        latent: Float[Array, "B T L"],
        k_rope: Float[Array, "B T R"],
        positions: Int[Array, "B T"],
        scale: float,
    ) -> tuple[Float[Array, "B T N L"], LatentCache]:
        """Stores the new entries and attends in the latent space (arXiv 2405.04434, section 2.1).

        Returns:
            [B, T, N, L] attention-weighted latents, before the value up-projection; the cache.
        """
        cache = self.append(latent, k_rope, positions)
        live = jnp.minimum(cache.lengths, self.capacity)
        with jax.named_scope("attend"):
            if q_latent.shape[1] == 1:
                out = mla_decode(
                    q_latent[:, 0], q_rope[:, 0], cache.latent, cache.k_rope, live, scale
                )
                return out[:, None], cache
            q = jnp.concatenate([q_latent, q_rope], axis=-1)
            k = jnp.concatenate([cache.latent, cache.k_rope], axis=-1)[:, :, None]
            q_slots = slots.query_slots(self.lengths, positions)
            k_slots = slots.live_slots(live, self.capacity)
            out = causal_attention(
                q, k, cache.latent[:, :, None], q_slots, k_slots, AttentionSpec(scale)
            )
            return out, cache
