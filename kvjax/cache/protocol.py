"""What a cache is to the model: one call that stores new entries and attends."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand, causal_attention


@runtime_checkable
class Cache(Protocol):
    """Keys and values of one layer.

    Caches are pytrees, whose fields jax fills with other things than arrays (shapes, shardings,
    markers): they are annotated Any, and their docstrings give the shapes.

    `lengths` [B] counts the tokens a sequence has given to the cache. Beyond `capacity` tokens
    nothing more is stored, and lengths > capacity says so.
    """

    @property
    def lengths(self) -> jax.Array: ...

    @property
    def capacity(self) -> int | jax.Array:
        """Tokens a sequence can give to this cache in all; [B] where sequences differ."""
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
            positions: [B, T] int32; −1 marks padding, neither stored nor attended.
            spec: scale, window, soft-cap.
            expand: rebuilds keys from the entries where these are latents.

        Returns:
            [B, T, N, Hv] in q's dtype, and the cache with the new entries.

        Raises:
            NotImplementedError: this cache cannot hold entries of this kind; says why.
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
            [B, T, N, L] attention-weighted latents, before the value up-projection; the cache.
        """
        ...


@flax.struct.dataclass
class NoCache:
    """Attends over the new entries alone and keeps nothing: the full causal forward.

    Attributes:
        segments: [B, T] int32, the document that each token belongs to, where several are packed
            into a row: a token attends only within its own. None: one document a row.
    """

    segments: Any = None

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T M Hv"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], None]:
        """See `Cache.attend`."""
        if expand is not None:
            k = expand(k, positions)
        return causal_attention(q, k, v, positions, positions, spec, self.segments), None


def cache_bytes(cache: Any) -> int:
    """Bytes held by all arrays of a cache, or of a list of them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
