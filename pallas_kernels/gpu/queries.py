"""Queries as the GPU kernel takes them: in groups of at most 64 that read the same rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.plan import ROWS, TILE


def group_size(queries: int) -> tuple[int, int]:
    """Queries of a group, a multiple of 8, and how many groups hold them all."""
    groups = -(-queries // ROWS)
    return min(-(-queries // TILE) * TILE, ROWS), groups


def into_groups(q: Float[Array, "Z G X"]) -> Float[Array, "rows X"]:
    """[Z · groups · size, X], and rows enough for a copy of 64."""
    (Z, G, X), (size, groups) = q.shape, group_size(q.shape[1])
    rows = jnp.pad(q, ((0, 0), (0, size * groups - G), (0, 0))).reshape(-1, X)
    return jnp.pad(rows, ((0, max(ROWS - Z * groups * size, 0)), (0, 0)))


def from_groups(x: jax.Array, queries: int) -> jax.Array:
    """[Z · groups, size, …] back to [Z, G, …]."""
    _, groups = group_size(queries)
    whole = x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
    return whole[:, :queries]
