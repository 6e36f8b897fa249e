"""Where each head's rows are in a flat pool, as arrays: budgets are data, not part of a program."""

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
    """The rows of each head of each sequence, in a pool that may hold those of other layers too.

    Segments do not overlap. They may come in any order and leave gaps.

    Attributes:
        starts, capacities: [B, K] int32, the first row of each head's segment and its rows.
        align: starts are multiples of it; so is the end of the pool.
        span: at least as many rows as all K segments of one sequence have together. It bounds the
            work list of the TPU kernel. None: the rows of the pool.
    """

    starts: Any
    capacities: Any
    align: int = field(default=1, metadata={"static": True})
    span: int | None = field(default=None, metadata={"static": True})

    @property
    def num_heads(self) -> int:
        """K."""
        return self.starts.shape[1]

    def room(self, pool_rows: int) -> jax.Array:
        """[B, K] the most live rows of each segment: its capacity, or what the pool has of it."""
        rows = jnp.minimum(self.capacities, pool_rows - self.starts)
        return jnp.where(self.starts < 0, 0, jnp.maximum(rows, 0))

    def most_blocks(self, pool_rows: int, size: int) -> int:
        """The most blocks of `size` rows that the segments of one sequence can have.

        Each segment may end in a block of its own that has a single row.
        """
        rows = pool_rows if self.span is None else min(self.span, pool_rows)
        return (rows + self.num_heads * (size - 1)) // size

    def alignment(self, pool_rows: int) -> int:
        """The most rows that every start and the pool's end are known to be multiples of."""
        return math.gcd(self.align, pool_rows)


class Newer(NamedTuple):
    """Rows that each query may see because their tokens are recent: those of a sliding window.

    Attributes:
        positions: [B, P] int32, of the pool's rows.
        than: [B, T] int32, for each query the newest position that it does not see.
    """

    positions: Any
    than: Any

    @classmethod
    def of_mask(cls, live: Bool[Array, "B P"]) -> Newer:
        """The rows of a mask, in the form that kernels read."""
        return cls(live.astype(jnp.int32), jnp.zeros((live.shape[0], 1), jnp.int32))


def assign_heads(sizes: Int[np.ndarray, "L K"], devices: int) -> Int[np.ndarray, "L K"]:
    """For every layer an order of its heads in which the first K / devices go to the first device,
    and so on, so that all devices hold nearly as many rows of all layers together.

    One layer alone may not balance (with as many heads as devices its largest head decides), all
    layers do: greedily, layers by their largest head, and in each layer the largest heads to the
    devices that hold least (longest processing time first: Graham, 1969).

    Args:
        sizes: rows of every head.

    Raises:
        ValueError: the devices do not divide the heads.
    """
    L, K = sizes.shape
    if K % devices:
        raise ValueError(f"got {K} KV heads, expected a multiple of {devices} devices")
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
