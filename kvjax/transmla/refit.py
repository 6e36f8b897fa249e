"""Least squares against the original layer, on what the converted layers before it really give it.

Two problems a layer, both linear in what they fit, with the cached latents and rotary keys as they
are: first the maps from queries to latents and to rotary parts, against the original scores; then
value up-projections and output, against the original output. No gradient step is taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import GQAConfig, ModelConfig, RopeConfig
from kvjax.nn.rope import rope
from kvjax.transmla.latent_layer import LatentLayer
from kvjax.transmla.layer import Heads, attention_weights, scores

QUERIES = 8192  # queries whose scores are fitted, spread over all sequences
GROUP = 8  # sequences that are worked on at a time
ITERATIONS = 20  # of the conjugate gradients that solve the first problem
SCORE_RIDGE = 1e-3  # pull towards the closed form, relative to the curvature
OUTPUT_RIDGE = 1e-4
HIGHEST = jax.lax.Precision.HIGHEST


class QueryMaps(NamedTuple):
    """What the first problem fits.

    Attributes:
        k_up: [L, N, H], also the map from a head's query to the latent it looks for.
        query_rope: [N, H, R].
    """

    k_up: jax.Array
    query_rope: jax.Array


class ScoreData(NamedTuple):
    """One sequence of the first problem, Q of its queries.

    Attributes:
        target, weights: [N, Q, T] original scores, and the attention that they give.
        q: [Q, N, H] queries of the converted prefix, before RoPE.
        c, k_rope: [T, L] latents and [T, R] rotated keys of the converted prefix.
    """

    target: jax.Array
    weights: jax.Array
    q: jax.Array
    c: jax.Array
    k_rope: jax.Array


def refit_scores(
    config: ModelConfig,
    base: GQAConfig,
    params: dict[str, Any],
    layer: LatentLayer,
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> LatentLayer:
    """Fits query maps to the original scores, each score weighted by its share of the attention.

    Scores count up to a constant for each query, which the softmax does not see. Solved by
    preconditioned conjugate gradients on the normal equations.

    Args:
        params: of the original layer.
        original, converted: what this layer gets in the original model, and behind the layers that
            are already converted.
    """
    S, T, _ = original.shape
    at = query_positions(T, -(-QUERIES // S))
    start = QueryMaps(_fp32(layer.k_up), _fp32(layer.query_rope))
    fitted = _solve_scores(
        config, base, layer.rope, params, _fp32(layer.down), _fp32(layer.key_rope), start, at,
        original, converted,
    )  # fmt: skip
    return dataclasses.replace(
        layer,
        k_up=np.asarray(fitted.k_up, np.float64),
        query_rope=np.asarray(fitted.query_rope, np.float64),
    )


def query_positions(length: int, count: int) -> Int[np.ndarray, " Q"]:
    """At most `count` positions, evenly spread up to the last."""
    stride = max(length // count, 1)
    return np.arange(length - 1, -1, -stride, dtype=np.int32)[:count][::-1].copy()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve_scores(
    config: ModelConfig,
    base: GQAConfig,
    turn: RopeConfig | None,
    params: dict[str, Any],
    down: Float[Array, "X L"],
    key_rope: Float[Array, "X R"],
    start: QueryMaps,
    at: Int[Array, " Q"],
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> QueryMaps:
    def observe(x_pair):
        return score_data(config, base, turn, params, down, key_rope, at, *x_pair)

    data = jax.lax.map(jax.vmap(observe), (_grouped(original), _grouped(converted)))

    def gradient(maps: QueryMaps, with_target: float) -> QueryMaps:
        """Of ½ Σ w·(s − target)²: affine in the maps, linear without the target."""

        def error(maps, group):
            each = jax.vmap(_score_error, in_axes=(None, 0, None, None, None, None))
            return jnp.sum(each(maps, group, with_target, at, base.scale, turn))

        def add(total, group):
            return jax.tree.map(jnp.add, total, jax.grad(error)(maps, group)), None

        zero = jax.tree.map(jnp.zeros_like, maps)
        return jax.lax.scan(add, zero, data)[0]

    curvature = _Curvature.of(data, base.scale)

    def normal(maps: QueryMaps) -> QueryMaps:
        pull = curvature.times(maps)
        return jax.tree.map(lambda h, p: h + SCORE_RIDGE * p, gradient(maps, 0.0), pull)

    step = jax.tree.map(jnp.negative, gradient(start, 1.0))
    change, _ = jax.scipy.sparse.linalg.cg(normal, step, maxiter=ITERATIONS, M=curvature.solve)
    return jax.tree.map(jnp.add, start, change)


def score_data(
    config: ModelConfig,
    base: GQAConfig,
    turn: RopeConfig | None,
    params: dict[str, Any],
    down: Float[Array, "X L"],
    key_rope: Float[Array, "X R"],
    at: Int[Array, " Q"],
    original: Float[Array, "T D"],
    converted: Float[Array, "T D"],
) -> ScoreData:
    """Targets from the original stream, queries and cache entries from the converted one."""
    want = Heads.of(config, base, params, original[None]).rotated(base)
    target = scores(want.q[:, at], want.k, base.scale)
    have = Heads.of(config, base, params, converted[None])
    c, k_rope = cache_entries(have, down, key_rope, turn)
    weights = attention_weights(target, at, base)
    return ScoreData(target[0], weights[0], have.q[0, at].astype(jnp.float32), c[0], k_rope[0])


def cache_entries(
    heads: Heads, down: Float[Array, "X L"], key_rope: Float[Array, "X R"], turn: RopeConfig | None
) -> tuple[Float[Array, "B T L"], Float[Array, "B T R"]]:
    """Latents and rotated keys of unrotated keys and values; fp32."""
    B, T = heads.k.shape[:2]
    kv = jnp.concatenate([heads.k, heads.v], axis=2).reshape(B, T, -1).astype(jnp.float32)
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    key = jnp.einsum("btx,xr->btr", kv, key_rope, precision=HIGHEST)
    key = rope(key[:, :, None], at, jnp.full((B,), T, jnp.int32), turn)[:, :, 0]
    return jnp.einsum("btx,xl->btl", kv, down, precision=HIGHEST), key


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


def _score_error(maps: QueryMaps, data: ScoreData, with_target, at, scale, turn) -> jax.Array:
    s = latent_scores(maps, data.q, data.c, data.k_rope, at, scale, turn)
    error = s - with_target * data.target
    error -= jnp.sum(data.weights * error, axis=-1, keepdims=True)
    return 0.5 * jnp.sum(data.weights * error * error)


class _Curvature(NamedTuple):
    """The Hessian as if queries and keys were independent: it scales and preconditions.

    Attributes:
        q: [N, H, H] Σ over the queries of qᵀq · scale².
        c: [L, L] covariance of the latents.
        rope: [R] mean square of the rotated keys.
    """

    q: jax.Array
    c: jax.Array
    rope: jax.Array

    @classmethod
    def of(cls, data: ScoreData, scale: float) -> _Curvature:
        q, c, k_rope = (_rows(x, n) for x, n in ((data.q, 2), (data.c, 1), (data.k_rope, 1)))
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


def _grouped(x: Float[Array, "S T D"]) -> Float[Array, "groups g T D"]:
    """A few sequences at a time: one alone keeps no processor busy."""
    return x.reshape(-1, math.gcd(len(x), GROUP), *x.shape[1:])


def _rows(x: jax.Array, inner: int) -> jax.Array:
    """All axes but the last `inner` as one."""
    outer = x.ndim - inner
    return x.reshape(math.prod(x.shape[:outer]), *x.shape[outer:])  # R may be 0: no −1


def _fp32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _lifted(matrix: Float[Array, "*n W W"]) -> Float[Array, "*n W W"]:
    """With enough on the diagonal to be inverted in fp32."""
    size = matrix.shape[-1]
    mean = jnp.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / max(size, 1)
    unit = jnp.broadcast_to(jnp.eye(size), matrix.shape)
    return matrix + (1e-5 * mean + 1e-30) * unit


def refit_outputs(
    config: ModelConfig,
    base: GQAConfig,
    params: dict[str, Any],
    layer: LatentLayer,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
    v_head_dim: int,
    biased: bool = True,
    sweeps: int = 3,
) -> LatentLayer:
    """Fits value up-projections, output projection and output bias to a target.

    Args:
        params, converted: as in `refit_scores`.
        target: what the attention shall add to the residual stream.
        v_head_dim: width V of the product v_up · out of a head.
        biased: whether the bias is fitted too; it stays as it is otherwise.
        sweeps: alternations between the two factors.
    """
    N, L = layer.k_up.shape[1], layer.k_up.shape[0]
    maps = QueryMaps(_fp32(layer.k_up), _fp32(layer.query_rope))
    gram, product = _output_equations(
        config, base, layer.rope, params, _fp32(layer.down), _fp32(layer.key_rope), maps,
        converted, target,
    )  # fmt: skip
    gram, product = np.asarray(gram, np.float64), np.asarray(product, np.float64)
    if not biased:
        gram, product = _with_bias(gram, product, layer.out_bias)
    start = np.einsum("lnv,nvd->nld", layer.v_up, layer.out).reshape(N * L, -1)
    start = np.concatenate([start, layer.out_bias[None]])
    whole = ridge(gram, product, start)
    bias = whole[-1]
    v_up, out = zip(
        *(
            factor(
                gram[h * L : (h + 1) * L, h * L : (h + 1) * L],
                whole[h * L : (h + 1) * L],
                v_head_dim,
            )
            for h in range(N)
        ),
        strict=True,
    )
    v_up, out = np.stack(v_up), np.stack(out)
    if v_head_dim < min(L, out.shape[-1]):
        for _ in range(sweeps):
            v_up, out, bias = _alternate(gram, product, v_up, out, bias)
    return dataclasses.replace(layer, v_up=np.swapaxes(v_up, 0, 1), out=out, out_bias=bias)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _output_equations(
    config: ModelConfig,
    base: GQAConfig,
    turn: RopeConfig | None,
    params: dict[str, Any],
    down: Float[Array, "X L"],
    key_rope: Float[Array, "X R"],
    maps: QueryMaps,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
) -> tuple[Float[Array, "F F"], Float[Array, "F D"]]:
    """FᵀF and FᵀY, F the attention-weighted latents of all heads and a column of ones."""
    (_, L), N, (_, T, D) = down.shape, base.num_heads, converted.shape
    at = jnp.arange(T, dtype=jnp.int32)

    def features(x):
        heads = Heads.of(config, base, params, x[None])
        c, k_rope = cache_entries(heads, down, key_rope, turn)
        s = latent_scores(
            maps, heads.q[0].astype(jnp.float32), c[0], k_rope[0], at, base.scale, turn
        )
        weights = attention_weights(s[None], at, base)[0]
        latents = jnp.einsum("nqt,tl->qnl", weights, c[0]).reshape(T, N * L)
        return jnp.concatenate([latents, jnp.ones((T, 1), jnp.float32)], axis=1)

    def add(total, group):
        f, y = _rows(jax.vmap(features)(group[0]), 1), _rows(group[1], 1).astype(jnp.float32)
        gram = jnp.einsum("qf,qg->fg", f, f, precision=HIGHEST)
        product = jnp.einsum("qf,qd->fd", f, y, precision=HIGHEST)
        return (total[0] + gram, total[1] + product), None

    width = N * L + 1
    zero = (jnp.zeros((width, width), jnp.float32), jnp.zeros((width, D), jnp.float32))
    return jax.lax.scan(add, zero, (_grouped(converted), _grouped(target)))[0]


def _with_bias(
    gram: Float[np.ndarray, "F F"], product: Float[np.ndarray, "F D"], bias: Float[np.ndarray, " D"]
) -> tuple[Float[np.ndarray, "F F"], Float[np.ndarray, "F D"]]:
    """The equations of all but the bias, which they give back as it is."""
    gram, product = gram.copy(), product - gram[:, -1:] * bias
    gram[-1], gram[:, -1], product[-1] = 0.0, 0.0, bias
    gram[-1, -1] = 1.0
    return gram, product


def ridge(
    gram: Float[np.ndarray, "F F"],
    product: Float[np.ndarray, "F D"],
    start: Float[np.ndarray, "F D"],
) -> Float[np.ndarray, "F D"]:
    """argmin ‖F·W − Y‖² + ρ·‖W − start‖², ρ relative to the mean of the diagonal."""
    rho = OUTPUT_RIDGE * np.trace(gram) / len(gram) + 1e-30
    lifted = gram + rho * np.eye(len(gram))
    return np.linalg.solve(lifted, product + rho * start)


def factor(
    gram: Float[np.ndarray, "L L"], weight: Float[np.ndarray, "L D"], width: int
) -> tuple[Float[np.ndarray, "L V"], Float[np.ndarray, "V D"]]:
    """The best factors of a given width: least ‖F·(weight − a·b)‖² for FᵀF = gram."""
    lifted = gram + (1e-9 * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    root = np.linalg.cholesky(lifted).T
    u, s, vt = np.linalg.svd(root @ weight, full_matrices=False)
    a, b = np.linalg.solve(root, u * np.sqrt(s)), np.sqrt(s)[:, None] * vt
    missing = max(width - len(s), 0)
    return np.pad(a[:, :width], ((0, 0), (0, missing))), np.pad(b[:width], ((0, missing), (0, 0)))


def _alternate(gram, product, v_up, out, bias):
    """Each head's v_up for the others as they are, then the outputs of all heads at once."""
    N, L, V = v_up.shape
    whole = np.concatenate([np.einsum("nlv,nvd->nld", v_up, out).reshape(N * L, -1), bias[None]])
    v_up = v_up.copy()
    for head in range(N):
        rows = slice(head * L, (head + 1) * L)
        rest = product[rows] - gram[rows] @ whole + gram[rows, rows] @ whole[rows]
        fitted = ridge(gram[rows, rows], rest, whole[rows])
        v_up[head] = fitted @ np.linalg.pinv(out[head])
        whole[rows] = v_up[head] @ out[head]
    wide = np.zeros((N * L + 1, N * V + 1))
    for head in range(N):
        wide[head * L : (head + 1) * L, head * V : (head + 1) * V] = v_up[head]
    wide[-1, -1] = 1.0
    start = np.concatenate([out.reshape(N * V, -1), bias[None]])
    solved = ridge(wide.T @ gram @ wide, wide.T @ product, start)
    return v_up, solved[:-1].reshape(out.shape), solved[-1]
