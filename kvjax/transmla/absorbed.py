"""The absorbed form of a layer that is being converted: what it caches, and the scores it gives."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import RopeConfig
from kvjax.nn.rope import rope
from kvjax.transmla.latent_layer import LatentLayer
from kvjax.transmla.layer import Heads

GROUP = 8  # sequences that are worked on at a time
HIGHEST = jax.lax.Precision.HIGHEST


class CacheMaps(NamedTuple):
    """Keys and values to what is cached, in fp32.

    Attributes:
        down, key_rope: [X, L] and [X, R], as in `LatentLayer`.
    """

    down: jax.Array
    key_rope: jax.Array

    @classmethod
    def of(cls, layer: LatentLayer) -> CacheMaps:
        """Those of a layer."""
        return cls(_fp32(layer.down), _fp32(layer.key_rope))


class QueryMaps(NamedTuple):
    """Queries to what they meet in the cache, in fp32.

    Attributes:
        k_up: [L, N, H], also the map from a head's query to the latent it looks for.
        query_rope: [N, H, R].
    """

    k_up: jax.Array
    query_rope: jax.Array

    @classmethod
    def of(cls, layer: LatentLayer) -> QueryMaps:
        """Those of a layer."""
        return cls(_fp32(layer.k_up), _fp32(layer.query_rope))


def _fp32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def cache_entries(
    heads: Heads, maps: CacheMaps, turn: RopeConfig | None
) -> tuple[Float[Array, "B T L"], Float[Array, "B T R"]]:
    """Latents and rotated keys of unrotated keys and values; fp32."""
    B, T = heads.k.shape[:2]
    kv = jnp.concatenate([heads.k, heads.v], axis=2).reshape(B, T, -1).astype(jnp.float32)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    key = jnp.einsum("btx,xr->btr", kv, maps.key_rope, precision=HIGHEST)
    key = rope(key[:, :, None], at, jnp.full((B,), T, jnp.int32), turn)[:, :, 0]
    return jnp.einsum("btx,xl->btl", kv, maps.down, precision=HIGHEST), key


def latent_scores(
    maps: QueryMaps,
    q: Float[Array, "Q N H"],
    c: Float[Array, "T L"],
    k_rope: Float[Array, "T R"],
    at: Int[Array, " Q"],
    scale: float,
    turn: RopeConfig | None,
) -> Float[Array, "N Q T"]:
    """Absorbed scores of queries at the positions `at`."""
    T = c.shape[0]
    q_rope = jnp.einsum("qnh,nhr->qnr", q, maps.query_rope)
    q_rope = rope(q_rope[None], at[None], jnp.full((1,), T, jnp.int32), turn)[0]
    q_latent = jnp.einsum("qnh,lnh->qnl", q, maps.k_up)
    s = jnp.einsum("qnl,tl->nqt", q_latent, c) + jnp.einsum("qnr,tr->nqt", q_rope, k_rope)
    return s * scale


def grouped(x: Float[Array, "S T D"]) -> Float[Array, "groups g T D"]:
    """A few sequences at a time: one alone keeps no processor busy."""
    return x.reshape(-1, math.gcd(len(x), GROUP), *x.shape[1:])


def rows(x: jax.Array, inner: int) -> jax.Array:
    """All axes but the last `inner` as one."""
    outer = x.ndim - inner
    return x.reshape(math.prod(x.shape[:outer]), *x.shape[outer:])  # R may be 0: no −1
