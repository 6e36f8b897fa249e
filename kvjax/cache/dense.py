"""The uncompressed cache: every token of every KV head."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import slots
from kvjax.cache.attention import AttentionSpec, Expand, causal_attention, expanded_attention
from pallas_kernels import gqa_decode


@flax.struct.dataclass
class DenseCache:
    """Keys and values (or latents) of all tokens; the slot of a token is its position.

    Attributes:
        k, v: [B, K, S, ·]; S tokens fit.
        lengths: [B] int32, tokens given so far; above S the surplus was dropped.
    """

    k: Any
    v: Any
    lengths: Any

    @classmethod
    def create(
        cls, batch: int, heads: int, capacity: int, key_dim: int, value_dim: int, dtype
    ) -> DenseCache:
        """An empty cache for `capacity` tokens a sequence."""
        return cls(
            k=jnp.zeros((batch, heads, capacity, key_dim), dtype),
            v=jnp.zeros((batch, heads, capacity, value_dim), dtype),
            lengths=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> DenseCache:
        """Stores the new entries [B, T, K, ·] where position ≥ 0."""
        where, lengths = slots.token_slots(self.lengths, positions, self.capacity)
        with jax.named_scope("cache_update"):
            return DenseCache(
                k=slots.write_rows(self.k, k, where),
                v=slots.write_rows(self.v, v, where),
                lengths=lengths,
            )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], DenseCache]:
        """See `Cache.attend`."""
        cache = self.append(k, v, positions)
        live = jnp.minimum(cache.lengths, self.capacity)
        with jax.named_scope("attend"):
            if q.shape[1] == 1 and expand is None:
                out = gqa_decode(
                    q[:, 0],
                    cache.k,
                    cache.v,
                    live,
                    scale=spec.scale,
                    window=spec.window,
                    softcap=spec.softcap,
                )
                return out[:, None], cache
            q_slots = slots.query_slots(self.lengths, positions)
            k_slots = slots.live_slots(live, self.capacity)
            keys, values = jnp.swapaxes(cache.k, 1, 2), jnp.swapaxes(cache.v, 1, 2)
            if expand is None:
                return causal_attention(q, keys, values, q_slots, k_slots, spec), cache
            return expanded_attention(q, keys, values, q_slots, k_slots, spec, expand), cache
