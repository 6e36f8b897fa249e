"""Rows copied into a pool, a block at a time: the time follows what is copied.

A loop whose number of turns is data copies one block of one head of one sequence in each turn, so
that one program serves all budgets, and nothing of the size of the pool is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.cache.entries import encode
from kvjax.cache.pool import Pool

BLOCK = 64  # rows that a turn copies

Rows = Callable[[jax.Array, jax.Array, jax.Array], Any]
"""(sequence, head, ranks [BLOCK]) to the rows of these ranks, [BLOCK, …]."""


def lay_segments(
    pool: Pool,
    row: Any,
    held_BK: Int[Array, "B K"],
    first_B: Int[Array, " B"],
    rooms_BK: Int[Array, "B K"],
    rings_BK: Bool[Array, "B K"],
    window: int | None,
) -> Pool:
    """The pool's tables with the segments of one layer: one after the other from its first row on.

    Args:
        row: the layer's place in the tables.
        held_BK: rows that each head keeps.
        first_B: the layer's first row.
        rooms_BK: rows for new tokens.
        rings_BK: heads that overwrite older tokens when their room is used up.
        window: the layer's sliding window: nothing behind it is seen again, so no head has more
            rows, and its ring is the whole segment.
    """
    capacities = held_BK + rooms_BK
    if window is not None:
        capacities = jnp.minimum(capacities, window)
    whole = -(-capacities // pool.align) * pool.align
    starts = first_B[:, None] + jnp.cumsum(whole, axis=1, dtype=jnp.int32) - whole
    ring = jnp.zeros_like(held_BK) if window is not None else held_BK
    rings = jnp.where(rings_BK, ring, capacities)

    def put(table: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(table, values.astype(jnp.int32), row, 1)

    return dataclasses.replace(
        pool,
        starts=put(pool.starts, starts),
        capacities=put(pool.capacities, capacities),
        kept=put(pool.kept, held_BK),
        rings=put(pool.rings, rings),
    )


def copy_rows(
    entries: Any, rows: Rows, starts_BK: Int[Array, "B K"], counts_BK: Int[Array, "B K"]
) -> Any:
    """Entries [B, P, …] of a pool with `counts` new rows from each start on.

    Args:
        rows: makes the rows; they are encoded as the entries are.
    """
    K = counts_BK.shape[1]
    P = entries.shape[1]
    size = min(BLOCK, P)
    blocks = -(-counts_BK.reshape(-1) // size)
    upto = jnp.cumsum(blocks, dtype=jnp.int32)

    def copy(turn: jax.Array, entries: Any) -> Any:
        owner = jnp.searchsorted(upto, turn, side="right").astype(jnp.int32)
        b, k = owner // K, owner % K
        start, count = starts_BK[b, k], counts_BK[b, k]
        wanted = start + (turn - (upto[owner] - blocks[owner])) * size
        # At the pool's end a block begins earlier; rows that belong to others stay.
        at = jnp.minimum(wanted, P - size)
        rank = at - start + jnp.arange(size, dtype=jnp.int32)
        valid = (rank >= 0) & (rank < count)
        new = encode(rows(b, k, jnp.clip(rank, 0, jnp.maximum(count - 1, 0))), entries)

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            where = (b, at, *(np.int32(0),) * (leaf.ndim - 2))
            old = jax.lax.dynamic_slice(leaf, where, (1, size, *leaf.shape[2:]))
            mask = valid.reshape(1, size, *(1,) * (leaf.ndim - 2))
            return jax.lax.dynamic_update_slice(leaf, jnp.where(mask, new[None], old), where)

        return jax.tree.map(put, entries, new)

    return jax.lax.fori_loop(0, upto[-1], copy, entries)
