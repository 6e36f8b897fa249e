"""Fits the query maps to the original attention logits: the first fit after the closed form.

With the cached latents and rotary keys fixed, attention logits are linear in the query maps. The
inputs of the fit are those that the converted layers in front of this one give.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.nn.layers import Turn
from kvjax.nn.transformer import Block
from kvjax.transmla.layer import (
    HIGHEST,
    CacheMaps,
    Heads,
    LatentLayer,
    QueryMaps,
    attention_logits,
    attention_weights,
    cache_entries,
    gqa_of,
    grouped,
    latent_logits,
    rows,
)

QUERIES = 8192  # queries whose attention logits are fitted, spread over all sequences
ITERATIONS = 20  # steps of the conjugate gradients
RIDGE = 1e-3  # weight of the distance to the closed form, relative to the curvature


class LogitData(NamedTuple):
    """The data of one sequence, for Q of its queries.

    Attributes:
        target, weights: [N, Q, T] original logits, and their softmax.
        q: [Q, N, H] queries of the converted prefix, before RoPE.
        c, k_rope: [T, L] latents and [T, R] rotated keys of the converted prefix.
    """

    target: jax.Array
    weights: jax.Array
    q: jax.Array
    c: jax.Array
    k_rope: jax.Array


def refit_queries(
    block: Block,
    params: dict[str, Any],
    layer: LatentLayer,
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> LatentLayer:
    """Fits query maps to the original attention logits, each weighted by its attention.

    A constant added to all logits of a query costs nothing, because the softmax ignores it. The
    normal equations are solved by preconditioned conjugate gradients.

    Args:
        block, params: the original layer.
        layer: from the closed form.
        original, converted: the input of this layer in the original model, and after the converted
            layers.

    Returns:
        The layer with other `k_up` and `query_rope`.
    """
    S, T, _ = original.shape
    at = query_positions(T, -(-QUERIES // S))
    maps = (CacheMaps.of(layer), QueryMaps.of(layer))
    fitted = _solve_queries(block, params, Turn.of(layer.rope), *maps, at, original, converted)
    return dataclasses.replace(
        layer,
        k_up=np.asarray(fitted.k_up, np.float64),
        query_rope=np.asarray(fitted.query_rope, np.float64),
    )


def query_positions(length: int, count: int) -> Int[np.ndarray, " Q"]:
    """At most `count` positions, evenly spaced, the last position among them."""
    stride = max(length // count, 1)
    return np.arange(length - 1, -1, -stride, dtype=np.int32)[:count][::-1].copy()


@functools.partial(jax.jit, static_argnums=0)
def _solve_queries(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    start: QueryMaps,
    at: Int[Array, " Q"],
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> QueryMaps:
    scale = gqa_of(block).scale

    def observe(x_pair):
        return logit_data(block, params, turn, cached, at, *x_pair)

    data = jax.lax.map(jax.vmap(observe), (grouped(original), grouped(converted)))

    def gradient(maps: QueryMaps, with_target: float) -> QueryMaps:
        """The gradient of ½ Σ w·(s − target)²: affine in the maps, linear without the target."""

        def error(maps, group):
            each = jax.vmap(_logit_error, in_axes=(None, 0, None, None, None, None))
            return jnp.sum(each(maps, group, with_target, at, scale, turn.rope))

        def add(total, group):
            return jax.tree.map(jnp.add, total, jax.grad(error)(maps, group)), None

        zero = jax.tree.map(jnp.zeros_like, maps)
        return jax.lax.scan(add, zero, data)[0]

    curvature = _Curvature.of(data, scale)

    def normal(maps: QueryMaps) -> QueryMaps:
        pull = curvature.times(maps)
        return jax.tree.map(lambda h, p: h + RIDGE * p, gradient(maps, 0.0), pull)

    # Solves for the change from the closed form, which also is where the ridge pulls to.
    step = jax.tree.map(jnp.negative, gradient(start, 1.0))
    change, _ = jax.scipy.sparse.linalg.cg(normal, step, maxiter=ITERATIONS, M=curvature.solve)
    return jax.tree.map(jnp.add, start, change)


def logit_data(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    at: Int[Array, " Q"],
    original: Float[Array, "T D"],
    converted: Float[Array, "T D"],
) -> LogitData:
    """The data of one sequence: targets from the original stream, the rest from the converted one.

    Args:
        block, params: the original layer.
        turn, cached: RoPE and cache maps of the converted layer.
        at: positions of the queries that are fitted.
    """
    base = gqa_of(block)
    want = Heads.of(block, params, original[None]).rotated(base)
    target = attention_logits(want.q[:, at], want.k, base.scale)
    have = Heads.of(block, params, converted[None])
    c, k_rope = cache_entries(have, cached, turn.rope)
    weights = attention_weights(target, at, base)
    return LogitData(target[0], weights[0], have.q[0, at].astype(jnp.float32), c[0], k_rope[0])


def _logit_error(maps: QueryMaps, data: LogitData, with_target, at, scale, turn) -> jax.Array:
    s = latent_logits(maps, data.q, data.c, data.k_rope, at, scale, turn)
    error = s - with_target * data.target
    # The best constant for each query.
    error -= jnp.sum(data.weights * error, axis=-1, keepdims=True)
    return 0.5 * jnp.sum(data.weights * error * error)


class _Curvature(NamedTuple):
    """An approximation of the Hessian, as if queries and keys were independent.

    It preconditions the conjugate gradients, and scales the ridge.

    Attributes:
        q: [N, H, H] Σ over the queries of qᵀq · scale².
        c: [L, L] covariance of the latents.
        rope: [R] mean square of the rotated keys.
    """

    q: jax.Array
    c: jax.Array
    rope: jax.Array

    @classmethod
    def of(cls, data: LogitData, scale: float) -> _Curvature:
        q, c, k_rope = (rows(x, n) for x, n in ((data.q, 2), (data.c, 1), (data.k_rope, 1)))
        q = jnp.einsum("qnh,qng->nhg", q, q, precision=HIGHEST) * scale**2
        c = c - jnp.mean(c, axis=0, keepdims=True)
        covariance = jnp.einsum("tl,tm->lm", c, c, precision=HIGHEST) / len(c)
        R = k_rope.shape[-1]
        power = jnp.mean(k_rope**2, axis=0).reshape(2, R // 2)
        power = jnp.tile(jnp.mean(power, axis=0), 2)  # RoPE turns the two halves into each other
        return cls(_lifted(q), _lifted(covariance), power + 1e-6 * jnp.mean(power))

    def times(self, maps: QueryMaps) -> QueryMaps:
        return QueryMaps(
            jnp.einsum("lm,mnh,nhg->lng", self.c, maps.k_up, self.q),
            jnp.einsum("nhg,ngr->nhr", self.q, maps.query_rope) * self.rope[None, None],
        )

    def solve(self, maps: QueryMaps) -> QueryMaps:
        inverse = jnp.linalg.inv(self.q)
        left = jnp.linalg.solve(self.c, maps.k_up.reshape(len(self.c), -1))
        return QueryMaps(
            jnp.einsum("lnh,nhg->lng", left.reshape(maps.k_up.shape), inverse),
            jnp.einsum("nhg,ngr->nhr", inverse, maps.query_rope) / self.rope[None, None],
        )


def _lifted(matrix: Float[Array, "*n W W"]) -> Float[Array, "*n W W"]:
    """Adds to the diagonal of a covariance, so that it can be inverted in fp32."""
    size = matrix.shape[-1]
    mean = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / max(size, 1)
    unit = jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape)
    return matrix + (1e-5 * mean + 1e-30) * unit
