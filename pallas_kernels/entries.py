"""Cache entries: the formats in which they are stored, and the segments of a pool that hold them.

Entries are floats, 8-bit numbers with scales, packed 4-bit numbers, or bit patterns. Each 8-bit
entry (one token of one head) has a scale. Since q·k = scale · (q·values) and Σ w·v = Σ
(w·scale)·values, attention multiplies logits with the scales of keys, and weights with the scales
of values: 8-bit entries are never rebuilt in full precision. KIVI (arXiv 2402.02750) also quantizes
values by token. Packed entries are rebuilt where they are read, a tile of rows at a time.

A segment is the consecutive rows of one head in a flat pool. Budgets are arrays and no part of a
program: one compiled program serves any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.packed import Packed, is_packed, pack, packed_bytes, unpack

NEG_INF = -1e30
"""The logit of a dead row: finite, so that a query without live rows gives 0 and not NaN."""
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "int4": jnp.int4}
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


Entries = jax.Array | Quantized | Packed | Bits
"""Cache entries [..., X]: floats, quantized to 8 or 4 bits, or bit patterns."""
ENCODED = Quantized, Packed, Bits
"""The formats other than plain arrays."""


def empty(shape: tuple[int, ...], dtype: Any) -> Entries:
    """Entries of this shape in the format of the dtype, all bytes 0."""
    if is_packed(dtype):
        return Packed(jnp.zeros((*shape[:-1], packed_bytes(shape[-1])), jnp.uint8), shape[-1])
    values = jnp.zeros(shape, dtype)
    if is_quantized(dtype):
        return Quantized(values, jnp.zeros(shape[:-1], jnp.float32))
    return values


def row_bytes(width: int, dtype: Any) -> int:
    """Bytes of one row of `width` numbers in the format of the dtype, scales or ranges included."""
    row = jax.eval_shape(lambda: empty((1, width), dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))


def to_bits(x: jax.Array) -> Bits:
    """16-bit floats [..., X] as `Bits`."""
    return Bits(jax.lax.bitcast_convert_type(x, jnp.uint16), jnp.dtype(x.dtype))


def from_bits(entries: Entries) -> jax.Array | Quantized | Packed:
    """`Bits` as floats again; other entries unchanged."""
    if not isinstance(entries, Bits):
        return entries
    return jax.lax.bitcast_convert_type(entries.values, entries.dtype)


def quantize(x: Float[Array, "*B X"], dtype: Any) -> Quantized | Packed:
    """Quantizes each row. In 8 bits its largest magnitude becomes the dtype's largest value; for 4
    bits see `pack`.

    Args:
        x: [..., X].
        dtype: int8, float8_e4m3fn or int4.
    """
    if is_packed(dtype):
        return pack(x)
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype)]
    top = jnp.max(jnp.abs(x), axis=-1, initial=0.0)
    # A row of zeros has scale 1, so that nothing is divided by 0.
    scale = jnp.where(top > 0, top / largest, 1.0)
    values = x / scale[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantized(values.astype(dtype), scale)


def is_quantized(dtype: Any) -> bool:
    """Whether entries of this dtype stand for floats, with scales or ranges beside them."""
    return jnp.dtype(dtype) in map(jnp.dtype, DTYPES.values())


def plain(entries: Entries, dtype: Any) -> jax.Array:
    """The array for a product: 8-bit values in `dtype`, exactly and without their scale; packed
    entries as the floats they stand for."""
    entries = from_bits(entries)
    if isinstance(entries, Packed):
        return unpack(entries).astype(dtype)
    return entries.values.astype(dtype) if isinstance(entries, Quantized) else entries


def dequantize(entries: Entries, dtype: Any) -> jax.Array:
    """The entries [..., X] as floats of `dtype`, scales included."""
    entries = from_bits(entries)
    if not isinstance(entries, Quantized):
        return plain(entries, dtype).astype(dtype)
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """The rows of each head of each sequence, in a pool that may hold the rows of other layers.

    Segments do not overlap. They can have any order, and gaps between them.

    Attributes:
        starts: [B, K] int32, the first row of each head's segment.
        capacities: [B, K] int32, the number of rows of each segment.
        align: every start and the number of the pool's rows are multiples of it.
        span: an upper bound on the rows of all K segments of a sequence, which bounds the work list
            of the TPU kernel; None: the rows of the pool.
    """

    starts: Any
    capacities: Any
    align: int = field(default=1, metadata={"static": True})
    span: int | None = field(default=None, metadata={"static": True})

    @property
    def num_heads(self) -> int:
        """K, the number of KV heads."""
        return self.starts.shape[1]

    def room(self, pool_rows: int) -> jax.Array:
        """[B, K] how many live rows each segment can have.

        That is its capacity, cut off at the end of the pool; 0 for segments outside of the pool.
        """
        rows = jnp.minimum(self.capacities, pool_rows - self.starts)
        return jnp.where(self.starts < 0, 0, jnp.maximum(rows, 0))

    def most_blocks(self, pool_rows: int, size: int) -> int:
        """An upper bound on the blocks of `size` rows in all segments of one sequence."""
        # The worst case: every segment ends with a block that has a single row.
        rows = pool_rows if self.span is None else min(self.span, pool_rows)
        return (rows + self.num_heads * (size - 1)) // size

    def alignment(self, pool_rows: int) -> int:
        """The largest number of which every start and the pool's end are known to be multiples."""
        return math.gcd(self.align, pool_rows)


class Newer(NamedTuple):
    """The rows inside each query's sliding window: rows whose position is larger than a bound.

    A bound instead of a mask: a mask would have to be made for every row of the pool, while a query
    reads only its head's rows.

    Attributes:
        positions: [B, P] int32, positions of the tokens in the pool's rows.
        than: [B, T] int32, for each query the last position before its window.
    """

    positions: Any
    than: Any

    @classmethod
    def of_mask(cls, live: Bool[Array, "B P"]) -> Newer:
        """The rows where a mask is True."""
        return cls(live.astype(jnp.int32), jnp.zeros((live.shape[0], 1), jnp.int32))


def assign_heads(sizes: Int[np.ndarray, "L K"], devices: int) -> Int[np.ndarray, "L K"]:
    """An order of each layer's heads that balances the rows of all layers over devices.

    The first K / devices heads of an order go to the first device, the next ones to the second, and
    so on. A single layer may stay unbalanced: with one head a device its largest head decides.

    Args:
        sizes: rows of each head.

    Raises:
        ValueError: K is not a multiple of `devices`.
    """
    L, K = sizes.shape
    if K % devices:
        raise ValueError(f"got {K} KV heads, expected a multiple of {devices} devices")
    # Greedily, the largest first (longest processing time first: Graham, 1969): layers by their
    # largest head, and the heads of a layer each to the device with the fewest rows so far.
    load, orders = np.zeros(devices, np.int64), np.zeros((L, K), np.int64)
    for layer in np.argsort(-sizes.max(axis=1), kind="stable"):
        places: list[list[int]] = [[] for _ in range(devices)]
        for head in np.argsort(-sizes[layer], kind="stable"):
            free = [d for d in range(devices) if len(places[d]) < K // devices]
            device = min(free, key=lambda d: load[d])
            places[device].append(int(head))
            load[device] += sizes[layer, head]
        orders[layer] = [head for heads in places for head in sorted(heads)]
    return orders


def soft_cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap · tanh(logits / softcap); the logits themselves if `softcap` is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
