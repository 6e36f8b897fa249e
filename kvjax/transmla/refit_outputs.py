"""Fits values and output to the original output: the second least squares after the closed form.

With the attention weights and cached latents fixed, the output is linear in v_up · out and in the
bias: F·W = Y, [M, F] · [F, D] = [M, D]. The features F are the attention-weighted latents of all N
heads, L numbers each, and a column of ones: N·L + 1 numbers. The inputs are those that the
converted layers in front of this one give.

The equations are kept in the smaller of two forms, both in fp64: `Normal` (FᵀF and FᵀY) for many
rows, `Rows` (F and Y) for fewer rows than features. Both have the same minimum. They are solved in
coordinates in which the features of each head are white (`Root`), so that features of very
different sizes count alike. The weight of the distance to the start is chosen on sequences that the
trial fits don't see.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax.nn.layers import Turn
from kvjax.nn.transformer import Block
from kvjax.transmla.layer import (
    CacheMaps,
    Heads,
    LatentLayer,
    QueryMaps,
    attention_weights,
    cache_entries,
    gqa_of,
    grouped,
    latent_logits,
    rows,
)
from kvjax.transmla.output_equations import (
    Equations,
    Group,
    HeadMaps,
    Normal,
    Rows,
    head_columns,
    lifted_solve,
    merged,
)
from kvjax.transmla.roots import Root

PULLS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Weights of the distance to the start, relative to white features."""
WEAK = 1e-3  # variance of a feature, relative to the largest, below which it counts less
MARGIN = 0.1  # relative difference of held-out errors that does not count
HELD_OUT = 8  # one sequence in HELD_OUT judges the weights


def refit_outputs(
    block: Block,
    params: dict[str, Any],
    layer: LatentLayer,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
    size: Float[Array, "S T"],
    v_head_dim: int,
    biased: bool = True,
    sweeps: int = 3,
) -> LatentLayer:
    """Fits value up-projections, output projection and output bias to a target.

    Args:
        block, params: the original layer.
        layer: the converted layer so far.
        converted: the input of this layer after the converted layers.
        target: the output that the attention should have.
        size: errors of a token are divided by it.
        v_head_dim: width V between v_up and out of a head.
        biased: fit the bias too; otherwise it is kept.
        sweeps: alternations between the two factors, where V is too small for an exact product.

    Returns:
        The layer with other `v_up`, `out` and `out_bias`; the same one if the fits only help on the
        text that they read.
    """
    arrays = (block, params, CacheMaps.of(layer), QueryMaps.of(layer), Turn.of(layer.rope))
    # The last sequences judge the pull; at the end all of them are fitted.
    cut = len(converted) - len(converted) // HELD_OUT - (1 < len(converted) < HELD_OUT)
    parts = [
        feature_groups(*arrays, converted[own], target[own], size[own])
        for own in (slice(cut), slice(cut, None))
    ]
    roots = _white_roots(parts[0] + parts[1], layer)
    inverses = np.stack([root.inverse for root in roots])
    form = Rows if converted.shape[0] * converted.shape[1] <= inverses[..., 0].size else Normal
    fitted, held = (form.of(part, inverses, target.shape[-1]) for part in parts)
    if not biased:
        fitted, held = (part.without_bias(layer.out_bias) for part in (fitted, held))
    v_up = np.stack([root.root for root in roots]) @ np.swapaxes(layer.v_up, 0, 1)
    heads = HeadMaps(v_up, layer.out, layer.out_bias)
    pull = choose_pull(fitted, held, heads.weight)
    if pull is None and v_head_dim == layer.out.shape[1]:
        return layer
    pull = PULLS[-1] if pull is None else pull
    heads = _fit(merged(fitted, held), heads, pull, v_head_dim, sweeps)
    v_up = np.swapaxes(inverses @ heads.v_up, 0, 1)
    return dataclasses.replace(layer, v_up=v_up, out=heads.out, out_bias=heads.bias)


def _white_roots(groups: Sequence[Group], layer: LatentLayer) -> list[Root]:
    """Coordinates in which all features of a head have size 1 and don't depend on each other.

    Weak features stay weak: a head that gives almost all attention to one token says nothing of
    them, and other text may take them a thousand times further.
    """
    L, N, _ = layer.k_up.shape
    return [Root.of(gram, WEAK, WEAK) for gram in head_grams(groups, N, L)]


def _fit(
    equations: Equations, start: HeadMaps, pull: float, v_head_dim: int, sweeps: int
) -> HeadMaps:
    """Fits all heads at once, and cuts each to the width V.

    Args:
        equations: in white coordinates.
        pull: weight of the distance to the start.
    """
    N, L, _ = start.v_up.shape
    # One least squares for all heads without a limit on the rank, then the best factors of width V
    # of each head.
    first = start.weight
    whole = equations.ridge(first, pull)
    columns = [head_columns(head, L) for head in range(N)]
    factors = [factor(lifted(equations.block(c), pull), whole[c], v_head_dim) for c in columns]
    v_up, out = (np.stack(parts) for parts in zip(*factors, strict=True))
    heads = HeadMaps(v_up, out, whole[-1].copy())
    del whole  # the largest array of a layer
    # Heads were cut one by one: now each is fitted again to what the others leave.
    if v_head_dim < min(L, out.shape[-1]):
        for _ in range(sweeps):
            heads = _alternate(equations, heads, first, pull)
    return heads


def choose_pull(
    fitted: Equations, held: Equations, start: Float[np.ndarray, "F D"]
) -> float | None:
    """The least weight of the distance to the start that held-out rows allow.

    The error of one layer tells little about the loss of the model, so differences of less than
    `MARGIN` between fits don't count: then the fit that changes more is taken, which also repairs
    more of what earlier layers lost.

    Args:
        fitted, held: white equations of two parts of the text; `held` may have no rows.
        start: W before the fit.

    Returns:
        One of PULLS; None if every fit has a larger held-out error than the start itself.
    """
    if held.empty:
        return 1.0
    errors = [held.error(fitted.ridge(start, pull)) for pull in PULLS]
    if min(errors) >= held.error(start):
        return None
    allowed = (1 + MARGIN) * min(errors)
    choices = zip(PULLS, errors, strict=True)
    return next((pull for pull, error in choices if error <= allowed), PULLS[-1])


def feature_groups(
    block: Block,
    params: dict[str, Any],
    cached: CacheMaps,
    maps: QueryMaps,
    turn: Turn,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
    size: Float[Array, "S T"],
) -> list[Group]:
    """F and Y of groups of sequences, with rows divided by `size`; fp32."""
    if not len(converted):
        return []
    each = zip(grouped(converted), grouped(target), grouped(size[..., None]), strict=True)
    return [_group(block, params, cached, maps, turn, *arrays) for arrays in each]


def head_grams(groups: Sequence[Group], heads: int, width: int) -> Float[np.ndarray, "N L L"]:
    """FᵀF of each head alone, multiplied in fp64.

    Where most attention goes to one token, the features of a head are nearly multiples of each
    other. Sums of fp32 products then have negative eigenvalues.
    """
    grams = np.zeros((heads, width, width))
    for f, _ in groups:
        for head in range(heads):
            own = np.asarray(f[:, head_columns(head, width)], np.float64)
            grams[head] += own.T @ own
    return grams


@functools.partial(jax.jit, static_argnums=0)
def _group(
    block: Block,
    params: dict[str, Any],
    cached: CacheMaps,
    maps: QueryMaps,
    turn: Turn,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
    size: Float[Array, "S T 1"],
) -> Group:
    features = functools.partial(_features, block, params, turn, cached, maps)
    weight = 1 / rows(size, 1)
    f, y = rows(jax.vmap(features)(converted), 1), rows(target, 1).astype(jnp.float32)
    return weight * f, weight * y


def _features(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    x: Float[Array, "T D"],
) -> Float[Array, "T F"]:
    """The features of one sequence: attention-weighted latents of all heads, and ones."""
    T = len(x)
    at = jnp.arange(T, dtype=jnp.int32)
    base, rope, heads = gqa_of(block), turn.rope, Heads.of(block, params, x[None])
    c, k_rope = cache_entries(heads, cached, rope)
    s = latent_logits(maps, heads.q[0].astype(jnp.float32), c[0], k_rope[0], at, base.scale, rope)
    weights = attention_weights(s[None], at, base)[0]
    latents = jnp.einsum("nqt,tl->qnl", weights, c[0]).reshape(T, -1)
    return jnp.concatenate([latents, jnp.ones((T, 1), jnp.float32)], axis=1)


def factor(
    gram: Float[np.ndarray, "L L"], weight: Float[np.ndarray, "L D"], width: int
) -> tuple[Float[np.ndarray, "L V"], Float[np.ndarray, "V D"]]:
    """The factors a [L, V] and b [V, D] of width V with the least ‖F·(weight − a·b)‖².

    With a root R of FᵀF = RᵀR, they are a truncated SVD of R · weight, times R⁻¹ on the left.

    Args:
        gram: FᵀF.
        width: V; columns beyond the rank are zeros.
    """
    root = Root.of(gram)
    seen = root.root @ weight
    # Left singular vectors from the smaller of the two square matrices.
    squares, u = np.linalg.eigh(seen @ seen.T)
    u, squares = u[:, ::-1][:, :width], squares[::-1][:width]
    # Smaller singular values are rounding errors, and rows of b are as small there.
    scale = np.maximum(squares, 1e-20 * squares[0] + 1e-60) ** 0.25
    a, b = root.inverse @ (u * scale), u.T @ seen / scale[:, None]
    missing = max(width - len(gram), 0)
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def _alternate(
    equations: Equations, heads: HeadMaps, start: Float[np.ndarray, "F D"], pull: float
) -> HeadMaps:
    """Fits v_up of one head after the other, then the output projections of all heads at once.

    Both fits are pulled to the same W as the first one, `start`.
    """
    heads = dataclasses.replace(heads, v_up=heads.v_up.copy())
    search = equations.search(heads)
    for head, out in enumerate(heads.out):
        # Multiplied by outᵀ on both sides, the equations of v_up · out are V numbers wide, not D.
        columns, metric = heads.columns(head), out @ out.T
        own = heads.v_up[head] @ metric
        missing = search.gradient(head) + pull * (start[columns] @ out.T - own)
        gram = lifted(equations.block(columns), pull)
        change = lifted_solve(gram, missing, 0.0)
        inverse = np.linalg.pinv(metric, rcond=1e-12, hermitian=True)
        search.replace(head, heads.v_up[head] + change @ inverse)
    narrow = equations.narrowed(heads.v_up).normal
    gram, product = narrow.gram.copy(), narrow.product.copy()
    N, L, V = heads.v_up.shape
    for head, v_up in enumerate(heads.v_up):
        columns = head_columns(head, V)
        gram[columns, columns] += pull * v_up.T @ v_up
        product[columns] += pull * v_up.T @ start[head_columns(head, L)]
    # Columns of v_up that are 0, or nearly depend on others, need a small pull of their own.
    small = 1e-9 * np.trace(gram[:-1, :-1]) / (N * V)
    solved = heads.rows + lifted_solve(gram, product - gram @ heads.rows, small)
    return HeadMaps(heads.v_up, solved[:-1].reshape(heads.out.shape), solved[-1])


def lifted(gram: Float[np.ndarray, "n n"], pull: float) -> Float[np.ndarray, "n n"]:
    """gram + pull · I."""
    return gram + pull * np.eye(len(gram))
