"""How the TPU kernels cut their work into pieces."""

import jax.numpy as jnp

from pallas_kernels.quantized import Entries
from pallas_kernels.segments import Segments, StaticSegments
from pallas_kernels.tpu.memory import LANES
from pallas_kernels.tuning import heads_of_piece


def dense_tiles(k: Entries, v: Entries, block: int, piece_bytes: int) -> tuple[int, int]:
    """Slots and KV heads of a piece of dense caches [B, K, S, ·]."""
    size = min(block, k.shape[2])
    row = sum(x.shape[3] * jnp.dtype(x.dtype).itemsize for x in (k, v))
    return size, heads_of_piece(k.shape[1], size * row, piece_bytes)


def block_size(pool_rows: int, block: int) -> int:
    """Rows of a piece of a pool: whole lanes, unless the pool is smaller."""
    fits = min(block, pool_rows) // LANES * LANES
    return fits if fits else pool_rows


def pool_pieces(segments: Segments, pool_rows: int, size: int) -> int:
    """The most pieces that the live rows of one pool can have."""
    if isinstance(segments, StaticSegments):
        return sum(-(-capacity // size) for capacity in segments.capacities)
    # Each segment may end in a part of a block.
    return segments.longest(pool_rows) // size + segments.num_heads


def padded_rows(pool_rows: int, size: int) -> int:
    """Rows that what belongs to a pool's rows must have: whole lanes, and room for a shift."""
    if size == pool_rows:
        return pool_rows
    return max(-(-pool_rows // LANES) * LANES, size + LANES)
