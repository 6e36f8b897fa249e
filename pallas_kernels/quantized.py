"""Cache entries in 8 bits: a scale for each entry (a token of one head), applied outside the dot.

q·k = scale · (q·values), and Σ w·v = Σ (w·scale)·values: the scale of a key multiplies a logit,
that of a value a weight, so that entries are never rebuilt in full precision (KIVI, arXiv
2402.02750, quantizes values by token likewise).
"""

from __future__ import annotations

from dataclasses import dataclass
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


Entries = jax.Array | Quantized
"""Cache entries [..., X], as they are or quantized."""


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
    return entries.values.astype(dtype) if isinstance(entries, Quantized) else entries


def dequantize(entries: Entries, dtype: Any) -> jax.Array:
    """[..., X] in `dtype`."""
    if not isinstance(entries, Quantized):
        return entries.astype(dtype)
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)
