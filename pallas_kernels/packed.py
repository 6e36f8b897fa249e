"""4-bit entries: each row packs two numbers into a byte, and has a range for each group of numbers.

A group's numbers are rounded to 16 levels: its lowest number, and 15 equal steps up to its highest
(KIVI, arXiv 2402.02750, equation 1). A row is complete in itself, unlike KIVI's groups of tokens:
any row can be written or read alone. Its bytes are the levels, then each group's lowest number and
step as 16-bit floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GROUP = 32
"""Most numbers of a group: 5 bits for each number, the range included."""
STEPS = 15
RANGE_BYTES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """4-bit entries.

    Attributes:
        values: [..., bytes] uint8, the packed rows.
        width: X, the numbers of a row.
    """

    values: Any
    width: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., X], as of the numbers that the rows stand for."""
        return (*self.values.shape[:-1], self.width)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.int4)


def is_packed(dtype: Any) -> bool:
    """Whether entries of this dtype are `Packed`."""
    return jnp.dtype(dtype) == jnp.int4


def groups(width: int) -> tuple[int, int]:
    """How many groups a row of `width` numbers has, and the numbers of a group: an even number.

    The last group may have fewer numbers than the others; its bytes are filled up.
    """
    count = -(-width // GROUP)
    return count, 2 * -(-width // (2 * max(count, 1)))


def packed_bytes(width: int) -> int:
    """Bytes of a packed row of `width` numbers."""
    count, size = groups(width)
    return count * (size // 2 + RANGE_BYTES)


def pack(x: Float[Array, "*B X"]) -> Packed:
    """Packs rows; each number changes by at most half a step of its group."""
    width, rows = x.shape[-1], x.shape[:-1]
    if width == 0:
        return Packed(jnp.zeros(x.shape, jnp.uint8), width)
    count, size = groups(width)
    # Repeating the last number fills the last group up without a change of its range.
    fill = [(0, 0)] * len(rows) + [(0, count * size - width)]
    parts = jnp.pad(x.astype(jnp.float32), fill, mode="edge").reshape(*rows, count, size)
    # Rounded outwards, the range encloses all numbers: none is cut off.
    low = _bits(jnp.min(parts, axis=-1), up=False)
    step = _bits((jnp.max(parts, axis=-1) - _float(low)) / STEPS, up=True)
    whole = jnp.where(step > 0, _float(step), 1.0)  # equal numbers have no step
    levels = jnp.round((parts - _float(low)[..., None]) / whole[..., None])
    levels = jnp.clip(levels, 0, STEPS).astype(jnp.uint8).reshape(*rows, 2, count * size // 2)
    codes = levels[..., 0, :] | (levels[..., 1, :] << 4)
    ranges = jax.lax.bitcast_convert_type(jnp.concatenate([low, step], axis=-1), jnp.uint8)
    ranges = ranges.reshape(*rows, count * RANGE_BYTES)
    return Packed(jnp.concatenate([codes, ranges], axis=-1), width)


def unpack(entries: Packed) -> Float[Array, "*B X"]:
    """The numbers that packed rows stand for, fp32."""
    rows, width = entries.values.shape[:-1], entries.width
    count, size = groups(width)
    codes, ranges = jnp.split(entries.values, [count * size // 2], axis=-1)
    # The low halves of all bytes have the first half of the numbers.
    levels = jnp.concatenate([codes & 15, codes >> 4], axis=-1).reshape(*rows, count, size)
    bits = jax.lax.bitcast_convert_type(ranges.reshape(*rows, 2, count, 2), jnp.uint16)
    low, step = (_float(bits[..., i, :])[..., None] for i in (0, 1))
    values = low + step * levels.astype(jnp.float32)
    return values.reshape(*rows, count * size)[..., :width]


def _bits(x: jax.Array, up: bool) -> jax.Array:
    """The bits of the nearest bfloat16 at or above fp32 numbers (`up`), or at or below them."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Without its last 16 bits a number is the next one towards 0. A carry moves away from 0.
    away = (x > 0) if up else (x < 0)
    return ((bits + jnp.where(away, jnp.uint32(0xFFFF), jnp.uint32(0))) >> 16).astype(jnp.uint16)


def _float(bits: jax.Array) -> jax.Array:
    """fp32 numbers of the bits of bfloat16 numbers."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
