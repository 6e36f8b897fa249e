"""How cache entries are stored: as floats, in 8 bits with scales, or as bit patterns.

Each 8-bit entry (one token of one head) has a scale. Since q·k = scale · (q·values) and
Σ w·v = Σ (w·scale)·values, attention multiplies logits with the scales of keys, and weights with
the scales of values: entries are never rebuilt in full precision. KIVI (arXiv 2402.02750) also
quantizes values by token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """8-bit entries, which stand for values · scale.

    Attributes:
        values: [..., X] int8 or float8_e4m3fn.
        scale: [...] fp32.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """16-bit floats, stored as their bit patterns.

    XLA:CPU converts 16-bit floats to float32 before it slices them: a loop over a pool would start
    with a float32 copy of the whole pool. Integers are sliced as they are.

    Attributes:
        values: [..., X] uint16.
        dtype: dtype of the floats.
    """

    values: Any
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Entries = jax.Array | Quantized | Bits
"""Cache entries [..., X]: floats, quantized, or bit patterns."""


def to_bits(x: jax.Array) -> Bits:
    """16-bit floats [..., X] as `Bits`."""
    return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16), jnp.dtype(x.dtype))


def from_bits(entries: Entries) -> jax.Array | Quantized:
    """`Bits` as floats again; other entries unchanged."""
    if not isinstance(entries, Bits):
        return entries
    return jax.lax.bitcast_convert_type(entries.values, entries.dtype)


def quantize(x: Float[Array, "*B X"], dtype: Any) -> Quantized:
    """Quantizes each row symmetrically: its largest magnitude becomes the dtype's largest value.

    Args:
        x: [..., X].
        dtype: int8 or float8_e4m3fn.
    """
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype)]
    top = jnp.max(jnp.abs(x), axis=-1)
    # A row of zeros has scale 1, so that nothing is divided by 0.
    scale = jnp.where(top > 0, top / largest, 1.0)
    values = x / scale[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantized(values.astype(dtype), scale)


def is_quantized(dtype: Any) -> bool:
    """Whether entries of this dtype carry scales."""
    return jnp.dtype(dtype) in LARGEST


def plain(entries: Entries, dtype: Any) -> jax.Array:
    """The array for a product: quantized values in `dtype`, exactly and without their scale."""
    entries = from_bits(entries)
    return entries.values.astype(dtype) if isinstance(entries, Quantized) else entries


def dequantize(entries: Entries, dtype: Any) -> jax.Array:
    """The entries [..., X] as floats of `dtype`, scales included."""
    entries = from_bits(entries)
    if not isinstance(entries, Quantized):
        return entries.astype(dtype)
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)
