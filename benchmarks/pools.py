"""Pools in which each head holds a given number of entries, without a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import ModelCache
from kvjax.cache.pool import lay_segments
from kvjax.cache.storage import as_pool
from kvjax.config import ModelConfig
from kvjax.policies.compression import Budgets, compression

Fill = Callable[[tuple[int, ...], Any], jax.Array]
"""(shape, dtype) to entries."""


def held_pool(
    config: ModelConfig,
    held: np.ndarray,
    tokens: int,
    room: int,
    batch: int,
    dtype: str,
    fill: Fill | None = None,
) -> ModelCache:
    """The caches of all layers after a prompt of which head k of layer l keeps held[l, k] tokens.

    Args:
        tokens: of the prompt.
        room: rows of each head for new tokens.
        fill: makes the entries; None: zeros.
    """
    L, K = held.shape
    budgets = Budgets(
        caps=np.broadcast_to(held, (batch, L, K)).astype(np.int32),
        recent=np.zeros(batch, np.int32),
        rooms=np.full((batch, L, K), room, np.int32),
        rings=np.zeros((batch, L, K), bool),
        scorer=None,
    )
    work = compression(config, budgets, [tokens] * batch, room, dtype, None, range(L))
    cache, rows = work.start(), work.rows[0]
    pool = cache.pools[0]
    for layer in range(L):
        kept, rooms, rings = (x[:, layer] for x in (budgets.caps, budgets.rooms, budgets.rings))
        segments = map(jnp.asarray, (kept, rows.first[:, layer, 0], rooms, rings))
        pool = lay_segments(pool, layer, *segments, window=None)
    if fill is not None:
        k, v = (as_pool(fill(entries.shape, dtype)) for entries in (pool.k, pool.v))
        pool = dataclasses.replace(pool, k=k, v=v)
    return dataclasses.replace(cache, pools=(pool,))
