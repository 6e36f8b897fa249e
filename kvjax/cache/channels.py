"""The normalisation of keys that are stored in 8 or 4 bits: each channel of each head is centred
and scaled before the key is quantized.

Some channels of keys are far larger than others, or far from 0 (KIVI, arXiv 2402.02750, section 3),
and a channel that shares its scale with such a channel would keep few of the levels. Qwen2.5's keys
lose 20 times as much in int8 without this (docs/headkv.md).
Attention needs no normalised key back. With s the size and c the centre of the channels,
q·k = (s∘q)·((k − c)/s) + q·c: queries are multiplied by s, and q·c is the same for all keys of a
head, so softmax removes it. A soft-cap would not, and layers with one have the centre 0.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.config import AttentionConfig, AttentionSpec
from pallas_kernels.entries import is_quantized

FORMAT = "bfloat16"
LEAST = 0.25
"""Least half range of a channel, as a share of the head's mean: a short prompt may show one value
only, and later keys differ from it."""


def channel_bytes(attention: AttentionConfig, dtype: Any) -> int:
    """Bytes of one layer's `KeyChannels`, for entries of this dtype."""
    if attention.shared_latent or not is_quantized(dtype):
        return 0
    return 2 * attention.cached_heads * attention.cached_widths[0] * jnp.dtype(FORMAT).itemsize


@flax.struct.dataclass
class KeyChannels:
    """Centre and size of each channel of the keys, measured over a prompt.

    Attributes:
        centre, size: [B, K, X] bfloat16; of all layers of a pool [B, L, K, X].
    """

    centre: Any
    size: Any

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> KeyChannels:
        """Channels that change nothing."""
        return cls(jnp.zeros(shape, FORMAT), jnp.ones(shape, FORMAT))

    @classmethod
    def of_prompt(
        cls, keys: Float[Array, "B K S X"], live: Bool[Array, "B Z S"], spec: AttentionSpec
    ) -> KeyChannels:
        """The channels of a prompt's keys.

        The size is the square root of half the channel's range. On SmolLM2 and stories260K that was
        slightly better than the range itself, and better than the deviation. Largest and lowest
        numbers do not depend on the length that the prompt is padded to.

        Args:
            live: slots that hold tokens.
        """
        keys, live = keys.astype(jnp.float32), live[..., None]
        top = jnp.max(jnp.where(live, keys, -jnp.inf), axis=2)
        low = jnp.min(jnp.where(live, keys, jnp.inf), axis=2)
        centre = (top + low) / 2 if spec.softcap is None else jnp.zeros_like(top)
        half = jnp.maximum(top - centre, centre - low)
        half = jnp.maximum(half, LEAST * jnp.mean(half, axis=-1, keepdims=True))
        size = jnp.where(half > 0, jnp.sqrt(half), 1.0)
        return cls(centre.astype(FORMAT), size.astype(FORMAT))

    def layer(self, row: Any) -> KeyChannels:
        """The channels of one layer of a pool."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, 1, keepdims=False), self)

    def with_layer(self, row: Any, layer: KeyChannels) -> KeyChannels:
        """The channels of a pool with those of one layer replaced."""
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=row, axis=1)
        return jax.tree.map(put, self, layer)

    def head(self, b: jax.Array, k: jax.Array) -> KeyChannels:
        """The channels [X] of one head of one sequence."""
        return jax.tree.map(lambda x: x[b, k], self)

    def normalised(self, keys: jax.Array, axis: int) -> jax.Array:
        """Keys as they are stored, fp32; `axis` is their axis of tokens."""
        centre, size = self._along(axis)
        return (keys.astype(jnp.float32) - centre) / size

    def restored(self, keys: jax.Array, axis: int) -> jax.Array:
        """The inverse of `normalised`, in the dtype of the keys."""
        centre, size = self._along(axis)
        return (keys.astype(jnp.float32) * size + centre).astype(keys.dtype)

    def _along(self, axis: int) -> tuple[jax.Array, jax.Array]:
        centre, size = (x.astype(jnp.float32) for x in (self.centre, self.size))
        return jnp.expand_dims(centre, axis), jnp.expand_dims(size, axis)

    def queries(self, q: Float[Array, "B T N X"]) -> Float[Array, "B T N X"]:
        """Queries for normalised keys."""
        size = jnp.repeat(self.size, q.shape[2] // self.size.shape[1], axis=1)
        return (q.astype(jnp.float32) * size[:, None].astype(jnp.float32)).astype(q.dtype)
