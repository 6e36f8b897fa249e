"""Cache entries as they are stored: plain arrays, or 8-bit values with scales.

Both are pytrees whose leaves share the leading axes, so that gathers and writes along these map
over the leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.dispatch import target
from pallas_kernels.quantized import (
    Bits,
    Entries,
    Quantized,
    from_bits,
    is_quantized,
    quantize,
    to_bits,
)


def empty(shape: tuple[int, ...], dtype: Any) -> Entries:
    """Zeros; with scales where the dtype is an 8-bit one."""
    values = jnp.zeros(shape, dtype)
    if is_quantized(dtype):
        return Quantized(values, jnp.zeros(shape[:-1], jnp.float32))
    return values


def empty_pool(shape: tuple[int, ...], dtype: Any, platform: str | None = None) -> Entries:
    """`empty` for a pool, which is written and read a few rows at a time.

    XLA:CPU does that in float32 for 16-bit floats, which it converts whole, there and back, so on
    CPUs a pool holds their bits.

    Args:
        platform: of the devices; None for those that programs are traced for.
    """
    return as_pool(empty(shape, dtype), platform)


def as_pool(entries: Entries, platform: str | None = None) -> Entries:
    """Entries in the form that a pool holds."""
    if isinstance(entries, Quantized | Bits) or (platform or target().platform) != "cpu":
        return entries
    return to_bits(entries) if entries.dtype in (jnp.bfloat16, jnp.float16) else entries


def encode(new: Entries, like: Entries) -> Entries:
    """New entries in the form of those that are stored; those that have it stay."""
    if isinstance(new, Quantized | Bits):
        return new
    if isinstance(like, Quantized):
        return quantize(new, like.dtype)
    new = new.astype(like.dtype)
    return to_bits(new) if isinstance(like, Bits) else new


def from_bits_everywhere(tree: Any) -> Any:
    """A pytree whose bit patterns are floats again."""
    return jax.tree.map(from_bits, tree, is_leaf=lambda leaf: isinstance(leaf, Bits))


def take_rows(entries: Entries, rows_BP: Int[Array, "B P"], live_BP: jax.Array) -> Entries:
    """Rows of [B, R, ·] entries, [B, P, ·]; zeros where they are not live."""

    def take(leaf: jax.Array) -> jax.Array:
        spread = (slice(None), slice(None), *(None,) * (leaf.ndim - 2))
        taken = jnp.take_along_axis(leaf, rows_BP[spread], axis=1)
        return jnp.where(live_BP[spread], taken, jnp.zeros((), leaf.dtype))

    return jax.tree.map(take, entries)
