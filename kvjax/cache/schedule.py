"""The kernels' work lists of a step of decoding, made once for all layers of a pool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache.layers import ModelCache
from kvjax.cache.pool import Pool
from kvjax.cache.sharded import device_spec, specs
from kvjax.mesh import Layout
from pallas_kernels import schedule


@functools.partial(jax.jit, static_argnames=("group", "layout"))
def work_lists(
    pool: Pool, positions: Int[Array, "B 1"], *, group: int, layout: Layout | None
) -> Any:
    """What the kernels of all layers read in a step; each device lists its own heads.

    Args:
        group: query heads of a KV head.

    Returns:
        As `pallas_kernels.schedule`.
    """

    def make(pool: Pool, positions: jax.Array) -> Any:
        new = (positions[:, 0] >= 0).astype(jnp.int32)
        given = pool.kept + (pool.lengths - pool.read + new)[:, None, None]
        live = jnp.minimum(given, pool.capacities)
        return schedule(
            jnp.swapaxes(pool.starts, 0, 1),
            jnp.swapaxes(live, 0, 1),
            queries_per_head=group,
            k_pool=pool.k,
            v_pool=pool.v,
            align=pool.align,
            span=pool.span,
        )

    if layout is None:
        return make(pool, positions)
    call = layout.run(make, (specs(pool, layout), layout.spec("batch")), device_spec(layout))
    return call(pool, positions)


def scheduled(
    caches: Any, positions: Any, query_heads: Sequence[int], run: Callable[..., Any] = work_lists
) -> Any:
    """The caches with the work lists of a step, which `advance` takes away again.

    Args:
        positions: [B, 1] of the step's tokens, −1 for none.
        query_heads: of each layer.
        run: calls `work_lists`, or says what it would return.
    """
    if not isinstance(caches, ModelCache):
        return caches
    pools = []
    for number, pool in enumerate(caches.pools):
        own = [place is not None and place[0] == number for place in caches.places]
        counts = {heads for heads, owned in zip(query_heads, own, strict=True) if owned}
        # Pools on CPUs are not aligned, and need no list.
        if pool.align > 1 and len(counts) == 1:
            group = counts.pop() // pool.starts.shape[2]
            lists = run(pool, positions, group=group, layout=caches.layout)
            pool = dataclasses.replace(pool, schedule=lists)
        pools.append(pool)
    return dataclasses.replace(caches, pools=tuple(pools))
