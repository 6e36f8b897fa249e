"""Cache entries in 8 bits: a scale for each entry (a token of one head), applied outside the dot.

q·k = scale · (q·values), and Σ w·v = Σ (w·scale)·values: the scale of a key multiplies a logit,
that of a value a weight, so that entries are never rebuilt in full precision (KIVI, arXiv
2402.02750, quantizes values by token likewise).
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
    """values · scale.

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
    """16-bit floats as their bit patterns.

    XLA for CPUs widens 16-bit floats before it cuts a slice from them: a loop over a pool would
    start with a copy of the whole pool in float32. Integers are cut as they are.

    Attributes:
        values: [..., X] uint16.
        dtype: of the floats.
    """

    values: Any
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Entries = jax.Array | Quantized | Bits
"""Cache entries [..., X]: as they are, quantized, or as bit patterns."""


def to_bits(x: jax.Array) -> Bits:
    """The bit patterns of 16-bit floats."""
    return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16), jnp.dtype(x.dtype))


def from_bits(entries: Entries) -> jax.Array | Quantized:
    """Bit patterns as the floats that they stand for; other entries as they are."""
    if not isinstance(entries, Bits):
        return entries
    return jax.lax.bitcast_convert_type(entries.values, entries.dtype)


def quantize(x: Float[Array, "*B X"], dtype: Any) -> Quantized:
    """Symmetric quantization of each row: the largest magnitude becomes the largest value."""
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype)]
    top = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(top > 0, top / largest, 1.0)
    values = x / scale[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantized(values.astype(dtype), scale)


def is_quantized(dtype: Any) -> bool:
    """Whether entries of this dtype carry scales."""
    return jnp.dtype(dtype) in LARGEST


def plain(entries: Entries, dtype: Any) -> jax.Array:
    """The array that a product reads: quantized values without their scale, in `dtype` (exact)."""
    entries = from_bits(entries)
    return entries.values.astype(dtype) if isinstance(entries, Quantized) else entries


def dequantize(entries: Entries, dtype: Any) -> jax.Array:
    """[..., X] in `dtype`."""
    entries = from_bits(entries)
    if not isinstance(entries, Quantized):
        return entries.astype(dtype)
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)
