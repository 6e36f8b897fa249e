"""Bytes of a TPU core's memories that a kernel needs, from shapes and dtypes alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.operands import Operands

LANES = 128
MIB = 2**20
VMEM = {"TPU v5 lite": 16 * MIB, "TPU v5": 16 * MIB}
"""What the compiler gives one kernel of the vector memory, unless it is asked for more: the limit
that libtpu names when a kernel passes it."""
NEWER_VMEM = 32 * MIB
INTERNAL = MIB // 8
"""What the compiler takes of it for itself."""
SMEM = MIB - 2**14
"""The scalar memory of every kind, less what the compiler keeps: lists of 258,048 pieces compile
and lists of 261,120 do not."""


def tile_rows(dtype: Any) -> int:
    """Rows of a DMA tile: 8 of 4-byte entries, 16 of 2-byte and 32 of 1-byte ones."""
    return 32 // jnp.dtype(dtype).itemsize


def vmem_bytes(x: Operands, out_dtype: Any) -> int:
    """What a grid step holds in vector memory.

    Beside the blocks and the state these are the copies that the compiler makes: entries widened
    to the queries' dtype, values without their dead rows, and weights. Where the compiler names
    the size of a kernel that is too large, it is this or up to a quarter less.

    Args:
        x: the blocks that a step reads: queries [C, G, X], entries [C, rows, X], what belongs to
            rows [C, rows].
    """
    dtype, (C, G, _) = x.queries[0].dtype, x.queries[0].shape
    entries = [*x.keys, *([] if x.values is None else [x.values])]
    out = C, G, x.weighed.shape[2]
    # The next step's blocks arrive while this one's are read.
    moved = sum(_padded(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x))
    moved += _padded(out, out_dtype) + _padded(out[:2], jnp.float32)
    state = _padded(out, jnp.float32) + 2 * _padded((C, G, 1), jnp.float32)
    widened = [e.shape for e in entries if e.dtype != dtype]
    masked = [x.weighed.shape] if x.weighed.dtype == dtype else []
    copies = sum(_padded(shape, dtype) for shape in (*widened, *masked))
    copies += _padded((C, G, x.weighed.shape[1]), jnp.float32)
    return 2 * moved + state + copies + INTERNAL


def _padded(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in vector memory: whole tiles, but single rows as they are."""
    *outer, rows, lanes = shape
    tile = tile_rows(dtype)
    rows = rows if rows == 1 else -(-rows // tile) * tile
    lanes = -(-lanes // LANES) * LANES
    return math.prod(outer) * rows * lanes * jnp.dtype(dtype).itemsize


def smem_bytes(pieces: int, segments: int) -> int:
    """The work list: an int32 a piece, four a segment, and two."""
    return 4 * (pieces + 4 * segments + 2)
