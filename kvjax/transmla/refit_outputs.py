"""Values and output fitted to the original's: the second least squares after the closed form.

With attention and cached latents as they are, the output is linear in v_up · out and the bias. What
is fitted is what the layers that are already converted really give this one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.nn.rope import Turn
from kvjax.nn.transformer import Block
from kvjax.transmla.absorbed import (
    HIGHEST,
    CacheMaps,
    QueryMaps,
    cache_entries,
    grouped,
    latent_scores,
    rows,
)
from kvjax.transmla.latent_layer import LatentLayer
from kvjax.transmla.layer import Heads, attention_weights, gqa_of
from kvjax.transmla.least_squares import Equations, HeadMaps, Normal, Rows, ridge


def refit_outputs(
    block: Block,
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
        block, params, converted: as in `refit_scores`.
        target: what the attention shall add to the residual stream.
        v_head_dim: width V of the product v_up · out of a head.
        biased: whether the bias is fitted too; it stays as it is otherwise.
        sweeps: alternations between the two factors.
    """
    N, L = layer.k_up.shape[1], layer.k_up.shape[0]
    maps = (CacheMaps.of(layer), QueryMaps.of(layer))
    few = converted.shape[0] * converted.shape[1] <= N * L
    form, solve_for = (Rows, output_rows) if few else (Normal, output_equations)
    arrays = solve_for(block, params, Turn.of(layer.rope), *maps, converted, target)
    equations: Equations = form(*(np.asarray(x, np.float64) for x in arrays))
    if not biased:
        equations = equations.without_bias(layer.out_bias)
    heads = HeadMaps(np.swapaxes(layer.v_up, 0, 1), layer.out, layer.out_bias)
    whole = equations.ridge(heads.weight)
    columns = map(heads.columns, range(N))
    factors = [factor(equations.block(c), whole[c], v_head_dim) for c in columns]
    v_up, out = (np.stack(parts) for parts in zip(*factors, strict=True))
    heads = HeadMaps(v_up, out, whole[-1].copy())
    del whole  # the largest array of a layer
    if v_head_dim < min(L, out.shape[-1]):
        for _ in range(sweeps):
            heads = _alternate(equations, heads)
    v_up = np.swapaxes(heads.v_up, 0, 1)
    return dataclasses.replace(layer, v_up=v_up, out=heads.out, out_bias=heads.bias)


@functools.partial(jax.jit, static_argnums=0)
def output_equations(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
) -> tuple[Float[Array, "F F"], Float[Array, "F D"]]:
    """FᵀF and FᵀY, F the attention-weighted latents of all heads and a column of ones."""
    features = functools.partial(_features, block, params, turn, cached, maps)

    def add(total, group):
        f, y = rows(jax.vmap(features)(group[0]), 1), rows(group[1], 1).astype(jnp.float32)
        gram = jnp.einsum("qf,qg->fg", f, f, precision=HIGHEST)
        product = jnp.einsum("qf,qd->fd", f, y, precision=HIGHEST)
        return (total[0] + gram, total[1] + product), None

    width = gqa_of(block).num_heads * cached.down.shape[1] + 1
    zero = jnp.zeros((width, width), jnp.float32)
    start = (zero, jnp.zeros((width, converted.shape[-1]), jnp.float32))
    return jax.lax.scan(add, start, (grouped(converted), grouped(target)))[0]


@functools.partial(jax.jit, static_argnums=0)
def output_rows(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
) -> tuple[Float[Array, "M F"], Float[Array, "M D"]]:
    """F and Y themselves, M = S·T; see `output_equations`."""
    features = functools.partial(_features, block, params, turn, cached, maps)
    return rows(jax.lax.map(features, converted), 1), rows(target, 1).astype(jnp.float32)


def _features(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    x: Float[Array, "T D"],
) -> Float[Array, "T F"]:
    """Attention-weighted latents of all heads of one sequence, and a column of ones."""
    T = len(x)
    at = jnp.arange(T, dtype=jnp.int32)
    base, rope, heads = gqa_of(block), turn.rope, Heads.of(block, params, x[None])
    c, k_rope = cache_entries(heads, cached, rope)
    s = latent_scores(maps, heads.q[0].astype(jnp.float32), c[0], k_rope[0], at, base.scale, rope)
    weights = attention_weights(s[None], at, base)[0]
    latents = jnp.einsum("nqt,tl->qnl", weights, c[0]).reshape(T, -1)
    return jnp.concatenate([latents, jnp.ones((T, 1), jnp.float32)], axis=1)


def factor(
    gram: Float[np.ndarray, "L L"], weight: Float[np.ndarray, "L D"], width: int
) -> tuple[Float[np.ndarray, "L V"], Float[np.ndarray, "V D"]]:
    """The best factors of a given width: least ‖F·(weight − a·b)‖² for FᵀF = gram."""
    lifted = gram + (1e-9 * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    root = np.linalg.cholesky(lifted).T
    seen = root @ weight
    # The left singular vectors alone, from a matrix that is no wider than high.
    squares, u = np.linalg.eigh(seen @ seen.T)
    u, squares = u[:, ::-1][:, :width], squares[::-1][:width]
    # Below the floor there is rounding only; b is as small there.
    scale = np.maximum(squares, 1e-20 * squares[0] + 1e-60) ** 0.25
    a, b = np.linalg.solve(root, u * scale), u.T @ seen / scale[:, None]
    missing = max(width - len(gram), 0)
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def _alternate(equations: Equations, heads: HeadMaps) -> HeadMaps:
    """Each head's v_up for the others as they are, then the outputs of all heads at once."""
    heads = dataclasses.replace(heads, v_up=heads.v_up.copy())
    search = equations.search(heads)
    for head, out in enumerate(heads.out):
        # The fit of the head's v_up · out, times outᵀ on both sides: V numbers wide, not D.
        gram, metric = equations.block(heads.columns(head)), out @ out.T
        own = heads.v_up[head] @ metric
        fitted = ridge(gram, search.gradient(head) + gram @ own, own)
        search.replace(head, fitted @ np.linalg.pinv(metric, rcond=1e-12, hermitian=True))
    solved = equations.narrowed(heads.v_up).ridge(heads.rows)
    return HeadMaps(heads.v_up, solved[:-1].reshape(heads.out.shape), solved[-1])
