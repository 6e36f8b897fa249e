"""How many rows a pool has, and where each layer's begin: made on the host, from budgets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

LARGE = 16_384
"""From so many rows on a pool is rounded less, see `bucket_rows`."""
ROOM = 64
LANES = 128
BYTE_TILE = 32


class PoolRows(NamedTuple):
    """The rows of a pool on each device.

    Attributes:
        rows: of each device; part of a program's shape.
        first: [B, L, D] int32, first row of each layer on each device.
        span: a bound on the rows of one layer, rounded like `rows`.
    """

    rows: int
    first: Int[np.ndarray, "B L D"]
    span: int


def bucket_rows(count: int) -> int:
    """`count` rounded up so that few sizes exist: by at most 12 %, from `LARGE` on by at most 3 %.

    Sizes are 9 … 17 times a power of two, from `LARGE` on 34 … 67 times one.
    """
    least = 9 if count < LARGE else 34
    step = 1
    while count > 2 * least * step:
        step *= 2
    return -(-count // step) * step


def room_bucket(max_new_tokens: int) -> int:
    """Rows for new tokens: the smallest of 64, 128, 256, … that holds so many; 0 for 0."""
    if max_new_tokens == 0:
        return 0
    return max(ROOM, 1 << (max_new_tokens - 1).bit_length())


def pool_rows(
    kept: Int[np.ndarray, "B L K"],
    rooms: Int[np.ndarray, "B L K"],
    limits: Int[np.ndarray, " L"],
    spare: int,
    align: int,
    devices: int,
) -> PoolRows:
    """The rows that hold all layers' segments, whichever sequence needs most.

    Args:
        kept: rows that each head keeps at most.
        rooms: rows of each head for new tokens.
        limits: the most rows that a head of each layer can use, kept and new.
        spare: rows of each layer that may be needed besides, where its heads share their budgets.
        align: segments start at multiples of it.
        devices: each holds an equal share of the heads, in order.
    """
    B, L, K = kept.shape
    segments = np.minimum(kept + rooms, limits[:, None])
    segments = -(-segments // align) * align
    shares = segments.reshape(B, L, devices, K // devices).sum(axis=3) + -(-spare // align) * align
    first = np.cumsum(shares, axis=1) - shares
    # Room for new tokens is a bucket of its own: it is not rounded again.
    growing = np.where(kept + rooms <= limits[:, None], rooms, 0).min(axis=0)
    growing = growing.reshape(L, devices, -1).sum(axis=2)
    fixed = int(growing.sum(axis=0).min())
    rows = bucket_rows(int(shares.sum(axis=1).max()) - fixed) + fixed
    span = bucket_rows(int(shares.max()))
    # TPUs read the scales of 8-bit entries in whole lanes, and copy those that do not end at one.
    tile = LANES if align == BYTE_TILE else align
    rows, span = (max(-(-count // tile) * tile, tile) for count in (rows, span))
    return PoolRows(rows, first.astype(np.int32), min(span, rows))
