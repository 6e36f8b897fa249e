"""Cache entries as they are stored: plain arrays, or 8-bit values with scales.

Both are pytrees whose leaves share the leading axes, so that gathers and writes along these map
over the leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.quantized import Entries, Quantized, is_quantized, quantize


def empty(shape: tuple[int, ...], dtype: Any) -> Entries:
    """Zeros; with scales where the dtype is an 8-bit one."""
    values = jnp.zeros(shape, dtype)
    if is_quantized(dtype):
        return Quantized(values, jnp.zeros(shape[:-1], jnp.float32))
    return values


def encode(new: jax.Array, like: Entries) -> Entries:
    """New entries in the form of those that are stored."""
    return quantize(new, like.dtype) if isinstance(like, Quantized) else new.astype(like.dtype)


def take_rows(entries: Entries, rows_BP: Int[Array, "B P"], live_BP: jax.Array) -> Entries:
    """Rows of [B, R, ·] entries, [B, P, ·]; zeros where they are not live."""

    def take(leaf: jax.Array) -> jax.Array:
        spread = (slice(None), slice(None), *(None,) * (leaf.ndim - 2))
        taken = jnp.take_along_axis(leaf, rows_BP[spread], axis=1)
        return jnp.where(live_BP[spread], taken, jnp.zeros((), leaf.dtype))

    return jax.tree.map(take, entries)
