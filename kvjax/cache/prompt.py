"""A dense cache that also remembers the last queries: what compression after prefill reads."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand
from kvjax.cache.dense import DenseCache


@flax.struct.dataclass
class PromptCache:
    """One layer's prompt while it is read.

    Attributes:
        dense: its keys and values.
        queries: [B, w, N, H] the last w queries of each sequence, rotated, the newest last; rows
            of sequences shorter than w start with zeros.
    """

    dense: DenseCache
    queries: Any

    @classmethod
    def create(cls, dense: DenseCache, window: int, num_heads: int, head_dim: int) -> PromptCache:
        """An empty cache that keeps the last `window` queries."""
        shape = (dense.k.shape[0], window, num_heads, head_dim)
        return cls(dense=dense, queries=jnp.zeros(shape, dense.k.dtype))

    @property
    def lengths(self) -> jax.Array:
        return self.dense.lengths

    @property
    def capacity(self) -> int:
        return self.dense.capacity

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], PromptCache]:
        """See `Cache.attend`."""
        out, dense = self.dense.attend(q, k, v, positions, spec, expand)
        window = self.queries.shape[1]
        # Padding is on the right, so the newest queries end where the valid tokens do.
        count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        seen = jnp.concatenate([self.queries, q.astype(self.queries.dtype)], axis=1)
        last = count[:, None] + jnp.arange(window, dtype=jnp.int32)[None]
        queries = jnp.take_along_axis(seen, last[:, :, None, None], axis=1)
        return out, PromptCache(dense=dense, queries=queries)
