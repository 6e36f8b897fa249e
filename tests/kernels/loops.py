"""Decode as a loop over a cache: steps that append one token and attend."""

import math

import jax
import jax.numpy as jnp
from pools import cache_of, empty_pool

from kvjax.cache import AttentionSpec, DenseCache, LatentCache

BATCH, WIDTH, ROPE = 8, 128, 64
HEADS = {"dense": 8, "head_budget": 3, "latent": 8}
KINDS = tuple(HEADS)


def decode_loop(kind, dtype, slots):
    """The loop (cache, x) → (cache, x), and the shapes of its arguments."""
    heads, spec = HEADS[kind], AttentionSpec(0.1)
    make = {
        "dense": lambda: DenseCache.create(BATCH, heads, slots, WIDTH, WIDTH, dtype),
        "head_budget": lambda: cache_of(
            empty_pool((32, slots - 96, 512), BATCH, WIDTH, dtype, align=32)
        ),
        "latent": lambda: LatentCache.create(BATCH, slots, WIDTH, ROPE, dtype),
    }

    def step(index, state):
        cache, x = state
        positions = jnp.broadcast_to(index, (BATCH, 1))
        if kind == "latent":
            rope = x[:, None, :, :ROPE]
            new = x[:, None, 0], rope[:, :, 0]
            out, cache = cache.attend_absorbed(x[:, None], rope, *new, positions, spec)
        else:
            new = x[:, None, :heads]
            layer = cache[0] if kind == "head_budget" else cache
            out, layer = layer.attend(x[:, None], new, new, positions, spec)
            lengths = cache.lengths + 1
            pooled = kind == "head_budget"
            cache = cache.with_layer(0, layer).advance(lengths) if pooled else layer
        return cache, out[:, 0]

    def decode(cache, x):
        return jax.lax.fori_loop(0, 32, step, (cache, x))

    queries = "float32" if dtype == "float32" else "bfloat16"
    x = jax.ShapeDtypeStruct((BATCH, 2 * heads, WIDTH), jnp.dtype(queries))
    return decode, jax.eval_shape(make[kind]), x


def largest(cache):
    """Numbers in the largest array of a cache."""
    return max(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache))
