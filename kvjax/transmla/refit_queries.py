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
from kvjax.transmla.roots import Root

QUERIES = 8192  # queries whose attention logits are fitted, spread over all sequences
ITERATIONS = 8  # steps of the conjugate gradients
RIDGE = 1e-3  # weight of the distance to the closed form, relative to the curvature
FLOOR = 1e-5  # least eigenvalue of a moment with unit diagonal; above the rounding of fp32 sums


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
    cached, start, turn = CacheMaps.of(layer), QueryMaps.of(layer), Turn.of(layer.rope)
    data, moments = _observe(block, params, turn, cached, at, original, converted)
    white = _White.of(moments)
    change = _solve(gqa_of(block).scale, data, _fp32(white), start, turn, at)
    k_up, query_rope = (np.asarray(x, np.float64) for x in change)
    k_up = np.einsum("lm,mng,nhg->lnh", white.c, k_up, white.q, optimize=True)
    query_rope = np.einsum("nhg,ngr->nhr", white.q, query_rope) * white.rope
    return dataclasses.replace(
        layer, k_up=layer.k_up + k_up, query_rope=layer.query_rope + query_rope
    )


def query_positions(length: int, count: int) -> Int[np.ndarray, " Q"]:
    """At most `count` positions, evenly spaced, the last position among them."""
    stride = max(length // count, 1)
    return np.arange(length - 1, -1, -stride, dtype=np.int32)[:count][::-1].copy()


class _Moments(NamedTuple):
    """Moments of queries and cache entries, from which white coordinates are chosen.

    Attributes:
        q: [N, H, H] Σ over the queries of qᵀq · scale².
        c_mean, c: [L] and [L, L] mean and covariance of the latents, weighted with the attention.
        rope: [R] mean square of the rotated keys, weighted alike.
    """

    q: jax.Array
    c_mean: jax.Array
    c: jax.Array
    rope: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _observe(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    at: Int[Array, " Q"],
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> tuple[LogitData, _Moments]:
    """The data of all sequences, with axes [groups, g] in front, and their moments."""

    def observe(x_pair):
        return logit_data(block, params, turn, cached, at, *x_pair)

    data = jax.lax.map(jax.vmap(observe), (grouped(original), grouped(converted)))
    q, c, k_rope = (rows(x, n) for x, n in ((data.q, 2), (data.c, 1), (data.k_rope, 1)))
    q = jnp.einsum("qnh,qng->nhg", q, q, precision=HIGHEST) * gqa_of(block).scale ** 2
    share = jnp.sum(data.weights, axis=(2, 3)).reshape(-1, 1)
    share = share / jnp.sum(share)
    mean = jnp.sum(share * c, axis=0)
    centred = jnp.sqrt(share) * (c - mean[None])
    covariance = jnp.einsum("tl,tm->lm", centred, centred, precision=HIGHEST)
    power = jnp.sum(share * k_rope**2, axis=0).reshape(2, k_rope.shape[-1] // 2)
    power = jnp.tile(jnp.mean(power, axis=0), 2)  # RoPE turns the two halves into each other
    return data, _Moments(q, mean, covariance, power)


class _White(NamedTuple):
    """Maps to coordinates in which queries and cache entries have the size 1.

    There the Hessian is close to the identity, as if queries and keys were independent.

    Attributes:
        q: [N, H, H], q · map is white.
        c_mean, c: [L] and [L, L], (c − mean) · map is white.
        rope: [R] factors of the rotated keys.
    """

    q: Any
    c_mean: Any
    c: Any
    rope: Any

    @classmethod
    def of(cls, moments: _Moments) -> _White:
        q, c_mean, c, power = (np.asarray(x, np.float64) for x in moments)
        maps = np.stack([Root.of(gram, FLOOR).inverse for gram in q])
        rope = np.maximum(power, FLOOR * power.max(initial=0.0) + 1e-30) ** -0.5
        return cls(maps, c_mean, Root.of(c, FLOOR).inverse, rope)


@functools.partial(jax.jit, static_argnums=0)
def _solve(
    scale: float,
    data: LogitData,
    white: _White,
    start: QueryMaps,
    turn: Turn,
    at: Int[Array, " Q"],
) -> QueryMaps:
    """The change of the query maps, in white coordinates."""

    def missing(group: LogitData) -> LogitData:
        """White data, with the targets that are left after the start."""
        each = jax.vmap(lambda d: latent_logits(start, d.q, d.c, d.k_rope, at, scale, turn.rope))
        return group._replace(
            target=group.target - each(group),
            q=jnp.einsum("sqnh,nhg->sqng", group.q, white.q),
            c=jnp.einsum(
                "stl,lm->stm", group.c - white.c_mean[None, None], white.c, precision=HIGHEST
            ),
            k_rope=group.k_rope * white.rope[None, None],
        )

    data = jax.lax.map(missing, data)

    def gradient(maps: QueryMaps, with_target: float) -> QueryMaps:
        """The gradient of ½ Σ w·(s − target)²: affine in the maps, linear without the target."""

        def error(maps, group):
            each = jax.vmap(_logit_error, in_axes=(None, 0, None, None, None, None))
            return jnp.sum(each(maps, group, with_target, at, scale, turn.rope))

        def add(total, group):
            return jax.tree.map(jnp.add, total, jax.grad(error)(maps, group)), None

        zero = jax.tree.map(jnp.zeros_like, maps)
        return jax.lax.scan(add, zero, data)[0]

    def normal(maps: QueryMaps) -> QueryMaps:
        return jax.tree.map(lambda h, m: h + RIDGE * m, gradient(maps, 0.0), maps)

    # The ridge pulls the change to zero, which is the closed form.
    zero = jax.tree.map(jnp.zeros_like, start)
    step = jax.tree.map(jnp.negative, gradient(zero, 1.0))
    return jax.scipy.sparse.linalg.cg(normal, step, maxiter=ITERATIONS)[0]


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


def _fp32(white: _White) -> _White:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), white)
