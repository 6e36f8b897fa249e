"""A batch that is read a few sequences at a time, so that prefill needs no more than decode."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.mesh import Layout, mesh_of
from kvjax.nn import Transformer
from kvjax.policies.compression import Compression
from kvjax.prefill import read_prompts


def prefill_in_groups(
    model: Transformer,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
    works: Sequence[Compression],
    size: int | None = None,
) -> tuple[jax.Array, list[Any]]:
    """`kvjax.prefill.read_prompts` of a few sequences after the others.

    While a prompt is read, one layer's keys and values exist uncompressed, and so do the residual
    streams: with small caches that is what limits the batch, unless few are read at a time.

    Args:
        works: of the whole batch.
        size: sequences at a time, at least the devices that the batch is split over; taken is the
            largest divisor of the batch up to it. None: all.

    Returns:
        As `read_prompts`.
    """
    ways = batch_ways(params, len(tokens))
    rows = group_rows(len(tokens), size, ways)
    if len(rows) == 1:
        return read_prompts(model, params, tokens, works)
    whole: Any = None
    for index, group in enumerate(rows):
        part = read_prompts(model, params, tokens[group], [work.take(group) for work in works])
        whole = jax.tree.map(functools.partial(_empty, len(rows)), part) if index == 0 else whole
        whole = _put(whole, part, jnp.asarray(index, jnp.int32), ways)
    return whole


def batch_ways(params: Any, batch: int) -> int:
    """Devices that a batch is split over."""
    mesh = mesh_of(params)
    if mesh is None:
        return 1
    return Layout.create(mesh, batch).batch_ways


def group_rows(batch: int, size: int | None, ways: int) -> Int[np.ndarray, "groups size"]:
    """The sequences of each group: of every device's share of the batch as many.

    Raises:
        ValueError: a size below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"prefill_size is {size}, expected ≥ 1")
    share = batch // ways
    own = max(
        (n for n in range(1, share + 1) if share % n == 0 and n * ways <= (size or batch)),
        default=1,
    )
    order = np.arange(batch).reshape(ways, share // own, own)
    return np.swapaxes(order, 0, 1).reshape(-1, ways * own)


def _empty(groups: int, leaf: jax.Array) -> jax.Array:
    """Room for all groups, where the first one lies."""
    shape = (groups * leaf.shape[0], *leaf.shape[1:])
    return jnp.zeros(shape, leaf.dtype, device=leaf.sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(whole: Any, part: Any, index: jax.Array, ways: int) -> Any:
    """Writes one group's rows in every device's share."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        own = part.shape[0] // ways
        shares = whole.reshape(ways, -1, own, *whole.shape[1:])
        new = part.reshape(ways, 1, own, *part.shape[1:])
        shares = jax.lax.dynamic_update_slice_in_dim(shares, new, index, 1)
        return shares.reshape(whole.shape)

    return jax.tree.map(put, whole, part)
