"""Pools of one layer without a model: empty, or what a policy makes of a prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import ModelCache, Pool
from kvjax.cache.pool import lay_segments, pool_rows
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.policies.compression import Budgets, compression
from kvjax.policies.scorers import ObservationWindow


def budgets(caps, batch, window=8, room=50, rings=False, scorer=None, **settings):
    """The same budgets `caps` [K] for each of `batch` prompts of a model of one layer."""
    shape = (batch, 1, len(caps))
    return Budgets(
        caps=np.broadcast_to(np.asarray(caps, np.int32), shape),
        recent=np.full(batch, window, np.int32),
        rooms=np.full(shape, room, np.int32),
        rings=np.broadcast_to(rings, shape),
        scorer=scorer or ObservationWindow(),
        observed=window,
        **settings,
    )


def at_work(found, lengths, spec, shape, dtype="float32"):
    """These budgets at work; `shape` is (N, K, H) of the attention."""
    heads, kv_heads, head_dim = shape
    settings = {"window": spec.window, "softcap": spec.softcap}
    rope = RopeConfig(head_dim)
    attention = GQAConfig(heads, kv_heads, head_dim, spec.scale, rope, **settings)
    config = ModelConfig("llama", 8, 8, (LayerConfig(attention, MLPConfig(8)),))
    return compression(config, found, lengths, int(found.rooms.max()), dtype, None, [0])


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=0)
def attend(cache, q, k, v, positions, spec):
    """New tokens through the only layer: what they attend to, and the cache with them."""
    out, layer = cache[0].attend(q, k, v, positions, spec)
    lengths = cache.lengths + (positions >= 0).sum(axis=1, dtype=np.int32)
    return out, cache.with_layer(0, layer).advance(lengths)


def segments(layer):
    """Starts, capacities and live rows [B, K] of a layer's heads, on the host."""
    tables = layer.table("starts"), layer.table("capacities"), layer.live(layer.given())
    return tuple(np.asarray(table) for table in tables)


def empty_pool(capacities, batch, width, dtype, positions=False, align=1):
    """A pool of one layer with these segments and nothing in them."""
    sizes = np.asarray(capacities, np.int64)[None, None]
    size = pool_rows(sizes, np.zeros_like(sizes), np.asarray([10**6]), 0, align, 1)
    shape = (batch, 1, len(capacities))
    lengths = jnp.zeros(batch, jnp.int32)
    widths = (width, width)
    pool = Pool.empty(shape, size.rows, widths, dtype, lengths, positions, align, size.span)
    held = jnp.broadcast_to(jnp.asarray(capacities, jnp.int32), (batch, len(capacities)))
    pool = lay_segments(pool, 0, held, lengths, held * 0, held < 0, None)
    return dataclasses.replace(pool, kept=pool.kept * 0)


def cache_of(pool):
    """The pool as a model of one layer has it."""
    return ModelCache((None,), (pool,), pool.lengths + 0, ((0, 0),))
