"""Where each head's rows are in a flat pool, and which device holds which heads.

Budgets are arrays and no part of a program: one compiled program serves any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


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
