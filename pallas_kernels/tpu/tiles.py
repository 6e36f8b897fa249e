"""How the TPU kernels cut their work into pieces."""

import jax.numpy as jnp

from pallas_kernels.quantized import Entries
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


def row_window(pool_rows: int, size: int) -> int:
    """Scales that a piece of a pool reads: those of its rows, from the whole lanes before on."""
    return pool_rows if size == pool_rows else size + LANES


def padded_rows(pool_rows: int, size: int) -> int:
    """Rows that what belongs to a pool's rows must have: whole lanes, and a window at least."""
    if size == pool_rows:
        return pool_rows
    return max(-(-pool_rows // LANES) * LANES, row_window(pool_rows, size))
