"""Which device holds which heads of a ragged pool, so that the bytes balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from pallas_kernels.segments import StaticSegments


@dataclass(frozen=True)
class HeadPlan:
    """Heads of each device, and where their segments lie in its part of the pool.

    Attributes:
        heads: of each device, ascending.
        starts, capacities: of these heads, in the device's rows.
        rows: of every device, as many as the fullest needs.
        align: starts and rows are multiples of it.
    """

    heads: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]
    capacities: tuple[tuple[int, ...], ...]
    rows: int
    align: int

    def spread(
        self, pool: Shaped[Array, "B P *H"], segments: StaticSegments
    ) -> Shaped[Array, "B R *H"]:
        """A pool of all heads as the devices hold it, device after device; zeros fill it up."""
        parts = []
        for heads, starts in zip(self.heads, self.starts, strict=True):
            at = 0
            for head, start in zip(heads, starts, strict=True):
                parts.append(_zeros(pool, start - at))
                first, size = segments.starts[head], segments.capacities[head]
                parts.append(pool[:, first : first + size])
                at = start + size
            parts.append(_zeros(pool, self.rows - at))
        return jnp.concatenate(parts, axis=1)


def plan_heads(capacities: Sequence[int], devices: int, align: int = 32) -> HeadPlan:
    """As many heads for every device, and nearly as many rows.

    The largest head goes to the emptiest device that has a place left; then pairs change places
    as long as that lowers the fuller of two devices.

    Raises:
        ValueError: the devices do not divide the heads.
    """
    K = len(capacities)
    if K % devices:
        raise ValueError(f"{K} KV heads, expected a multiple of {devices} devices")
    sizes = -(-np.asarray(capacities, np.int64) // align) * align
    groups: list[list[int]] = [[] for _ in range(devices)]
    for head in np.argsort(-sizes, kind="stable"):
        free = [group for group in groups if len(group) < K // devices]
        min(free, key=lambda group: sizes[group].sum()).append(int(head))
    while _exchange(groups, sizes):
        pass
    heads = tuple(tuple(sorted(group)) for group in groups)
    ends = [np.cumsum(sizes[list(group)]) for group in heads]
    return HeadPlan(
        heads=heads,
        starts=tuple((0, *map(int, end[:-1])) for end in ends),
        capacities=tuple(tuple(int(capacities[head]) for head in group) for group in heads),
        rows=max(int(end[-1]) for end in ends),
        align=align,
    )


def _exchange(groups: list[list[int]], sizes: np.ndarray) -> bool:
    """Lets two heads change places if that lowers the fuller of their devices."""
    for a, b in product(groups, groups):
        gap = sizes[a].sum() - sizes[b].sum()
        for i, j in product(range(len(a)), range(len(b))):
            moved = sizes[a[i]] - sizes[b[j]]
            if 0 < moved < gap:
                a[i], b[j] = b[j], a[i]
                return True
    return False


def _zeros(pool: jax.Array, rows: int) -> jax.Array:
    return jnp.zeros((pool.shape[0], rows, *pool.shape[2:]), pool.dtype)
