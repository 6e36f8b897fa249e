"""Fits values and output to the original output: the second least squares after the closed form.

With the attention weights and cached latents fixed, the output is linear in v_up · out and in the
bias: F·W = Y, [M, F] · [F, D] = [M, D]. The features F are the attention-weighted latents of all N
heads, L numbers each, and a column of ones: N·L + 1 numbers. The inputs are those that the
converted layers in front of this one give.

The equations are kept in the smaller of two forms, both in fp64: `Normal` (FᵀF and FᵀY) for many
rows, `Rows` (F and Y) for fewer rows than features. Both have the same minimum.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

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
    attention_weights,
    cache_entries,
    gqa_of,
    group_size,
    grouped,
    latent_logits,
    rows,
)

RIDGE = 1e-4  # weight of the distance to the start, relative to the mean of the diagonal
LIFT = 1e-6  # least weight relative to each feature, above the rounding of fp32 products
FLOOR = 1e-10  # least eigenvalue of a scaled FᵀF, whose mean eigenvalue is 1


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
        block, params: the original layer.
        layer: the converted layer so far.
        converted: the input of this layer after the converted layers.
        target: the output that the attention should have.
        v_head_dim: width V between v_up and out of a head.
        biased: fit the bias too; otherwise it is kept.
        sweeps: alternations between the two factors, where V is too small for an exact product.

    Returns:
        The layer with other `v_up`, `out` and `out_bias`.
    """
    N, L = layer.k_up.shape[1], layer.k_up.shape[0]
    maps = (CacheMaps.of(layer), QueryMaps.of(layer))
    # The equations, in the smaller form.
    few = converted.shape[0] * converted.shape[1] <= N * L
    form, solve_for = (Rows, output_rows) if few else (Normal, output_equations)
    arrays = solve_for(block, params, Turn.of(layer.rope), *maps, converted, target)
    equations: Equations = form(*(np.asarray(x, np.float64) for x in arrays))
    if not biased:
        equations = equations.without_bias(layer.out_bias)
    # One least squares for all heads without a limit on the rank, then the best factors of width V
    # of each head.
    heads = HeadMaps(np.swapaxes(layer.v_up, 0, 1), layer.out, layer.out_bias)
    whole = equations.ridge(heads.weight)
    columns = map(heads.columns, range(N))
    factors = [factor(equations.block(c), whole[c], v_head_dim) for c in columns]
    v_up, out = (np.stack(parts) for parts in zip(*factors, strict=True))
    heads = HeadMaps(v_up, out, whole[-1].copy())
    del whole  # the largest array of a layer
    # Heads were cut one by one: now each is fitted again to what the others leave.
    if v_head_dim < min(L, out.shape[-1]):
        for _ in range(sweeps):
            heads = _alternate(equations, heads)
    v_up = np.swapaxes(heads.v_up, 0, 1)
    return dataclasses.replace(layer, v_up=v_up, out=heads.out, out_bias=heads.bias)


def output_equations(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
) -> tuple[Float[np.ndarray, "F F"], Float[np.ndarray, "F D"]]:
    """FᵀF and FᵀY, where F has the attention-weighted latents of all heads and a column of ones.

    Groups of sequences are multiplied on the device in fp32 and added on the host in fp64. The
    blocks of FᵀF that belong to one head are multiplied in fp64 too: `factor` takes their roots.
    """
    N, L = gqa_of(block).num_heads, cached.down.shape[1]
    width = N * L + 1
    gram, product = np.zeros((width, width)), np.zeros((width, converted.shape[-1]))
    blocks = np.zeros((N, L, L))
    for index in range(len(converted) // group_size(len(converted))):
        arrays = (converted, target, np.int32(index))
        f, part, part_product = _group_equations(block, params, turn, cached, maps, *arrays)
        gram += np.asarray(part)
        product += np.asarray(part_product)
        # Where most attention goes to one token, the features of a head are nearly multiples of
        # each other. Sums of fp32 products then have negative eigenvalues.
        for head, own in enumerate(np.split(np.asarray(f)[:, :-1], N, axis=1)):
            own = own.astype(np.float64)
            blocks[head] += own.T @ own
    for head in range(N):
        columns = slice(head * L, (head + 1) * L)
        gram[columns, columns] = blocks[head]
    return gram, product


@functools.partial(jax.jit, static_argnums=0)
def _group_equations(
    block: Block,
    params: dict[str, Any],
    turn: Turn,
    cached: CacheMaps,
    maps: QueryMaps,
    converted: Float[Array, "S T D"],
    target: Float[Array, "S T D"],
    index: Int[Array, ""],
) -> tuple[Float[Array, "M F"], Float[Array, "F F"], Float[Array, "F D"]]:
    """F, FᵀF and FᵀY of one group of sequences; fp32."""
    features = functools.partial(_features, block, params, turn, cached, maps)
    f = rows(jax.vmap(features)(grouped(converted)[index]), 1)
    y = rows(grouped(target)[index], 1).astype(jnp.float32)
    gram = jnp.einsum("qf,qg->fg", f, f, precision=HIGHEST)
    return f, gram, jnp.einsum("qf,qd->fd", f, y, precision=HIGHEST)


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
    """F and Y, with M = S·T rows; see `output_equations`."""
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
    # Features can differ in size a thousandfold: scaled to one size, none hides in the rounding of
    # another. The floor keeps the root invertible where features depend on each other.
    squares = np.diag(gram)
    size = np.sqrt(np.maximum(squares, 1e-20 * squares.max() + 1e-60))
    values, vectors = np.linalg.eigh(gram / np.outer(size, size))
    scale = np.sqrt(np.maximum(values, FLOOR))
    root, inverse = scale[:, None] * (vectors.T * size), (vectors / size[:, None]) / scale
    seen = root @ weight
    # Left singular vectors from the smaller of the two square matrices.
    squares, u = np.linalg.eigh(seen @ seen.T)
    u, squares = u[:, ::-1][:, :width], squares[::-1][:width]
    # Smaller singular values are rounding errors, and rows of b are as small there.
    scale = np.maximum(squares, 1e-20 * squares[0] + 1e-60) ** 0.25
    a, b = inverse @ (u * scale), u.T @ seen / scale[:, None]
    missing = max(width - len(gram), 0)
    return np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))


def _alternate(equations: Equations, heads: HeadMaps) -> HeadMaps:
    """Fits v_up of one head after the other, then the output projections of all heads at once."""
    heads = dataclasses.replace(heads, v_up=heads.v_up.copy())
    search = equations.search(heads)
    for head, out in enumerate(heads.out):
        # Multiplied by outᵀ on both sides, the equations of v_up · out are V numbers wide, not D.
        gram, metric = equations.block(heads.columns(head)), out @ out.T
        own = heads.v_up[head] @ metric
        fitted = ridge(gram, search.gradient(head) + gram @ own, own)
        search.replace(head, fitted @ np.linalg.pinv(metric, rcond=1e-12, hermitian=True))
    solved = equations.narrowed(heads.v_up).ridge(heads.rows)
    return HeadMaps(heads.v_up, solved[:-1].reshape(heads.out.shape), solved[-1])


@dataclass(frozen=True)
class HeadMaps:
    """W with rank V for each head: the products v_up · out stacked over the heads, then the bias.

    Attributes:
        v_up, out, bias: [N, L, V], [N, V, D] and [D].
    """

    v_up: Float[np.ndarray, "N L V"]
    out: Float[np.ndarray, "N V D"]
    bias: Float[np.ndarray, " D"]

    @property
    def rows(self) -> Float[np.ndarray, "W D"]:
        """The rest of W after the maps v_up: `out` of all heads and the bias, N·V + 1 rows."""
        return np.concatenate([self.out.reshape(-1, len(self.bias)), self.bias[None]])

    @property
    def weight(self) -> Float[np.ndarray, "F D"]:
        """W: N·L + 1 rows."""
        N, L, _ = self.v_up.shape
        whole = np.empty((N * L + 1, len(self.bias)))
        np.matmul(self.v_up, self.out, out=whole[:-1].reshape(N, L, -1))
        whole[-1] = self.bias
        return whole

    def columns(self, head: int) -> slice:
        """The columns of F that belong to one head."""
        L = self.v_up.shape[1]
        return slice(head * L, (head + 1) * L)


@dataclass(frozen=True)
class Normal:
    """The equations as FᵀF and FᵀY, for any number of rows."""

    gram: Float[np.ndarray, "F F"]
    product: Float[np.ndarray, "F D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        """FᵀF of some features."""
        return self.gram[columns, columns]

    def ridge(self, start: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
        """argmin ‖F·W − Y‖² + ρ·‖W − start‖², ρ relative to the mean of the diagonal."""
        return ridge(self.gram, self.product, start)

    def narrowed(self, v_up: Float[np.ndarray, "N L V"]) -> Normal:
        """The equations of `HeadMaps.rows`: features of L numbers a head become V numbers."""
        half = _narrow(self.gram, v_up)
        return Normal(_narrow(half.T, v_up), _narrow(self.product.T, v_up).T)

    def without_bias(self, bias: Float[np.ndarray, " D"]) -> Normal:
        """The equations with a fixed bias: `ridge` keeps the last row of its start."""
        gram, product = self.gram.copy(), self.product - self.gram[:, -1:] * bias
        gram[-1], gram[:, -1], product[-1] = 0.0, 0.0, 0.0
        return Normal(gram, product)

    def search(self, heads: HeadMaps) -> NormalSearch:
        """A search that replaces v_up of one head after the other, in the arrays of `heads`."""
        return NormalSearch(self, heads)


@dataclass(frozen=True)
class Rows:
    """The equations as F and Y, for fewer rows than features; the methods are those of `Normal`."""

    features: Float[np.ndarray, "M F"]
    target: Float[np.ndarray, "M D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        return self.features[:, columns].T @ self.features[:, columns]

    def ridge(self, start: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
        # (FᵀF + ρ)⁻¹ Fᵀ = Fᵀ (FFᵀ + ρ)⁻¹: the matrix to solve with is [M, M].
        gram = self.features @ self.features.T
        gram[np.diag_indices_from(gram)] += _pull(np.trace(gram), self.features.shape[1])
        change = self.features.T @ np.linalg.solve(gram, self.target - self.features @ start)
        change += start
        return change

    def narrowed(self, v_up: Float[np.ndarray, "N L V"]) -> Rows:
        return Rows(_narrow(self.features, v_up), self.target)

    def without_bias(self, bias: Float[np.ndarray, " D"]) -> Rows:
        features = self.features.copy()
        features[:, -1] = 0.0
        return Rows(features, self.target - self.features[:, -1:] * bias)

    def search(self, heads: HeadMaps) -> RowsSearch:
        missing = self.target - self.narrowed(heads.v_up).features @ heads.rows
        return RowsSearch(self, heads, missing)


Equations = Normal | Rows


@dataclass(frozen=True)
class NormalSearch:
    """The heads whose v_up are replaced one after the other."""

    equations: Normal
    heads: HeadMaps

    def gradient(self, head: int) -> Float[np.ndarray, "L V"]:
        """Fᵀ(Y − F·W)·outᵀ, with F and `out` of one head."""
        # (W·outᵀ) first: V numbers wide, not D.
        columns, out = self.heads.columns(head), self.heads.out[head].T
        each = self.heads.v_up @ (self.heads.out @ out)
        weight = np.concatenate([each.reshape(-1, out.shape[1]), self.heads.bias[None] @ out])
        return self.equations.product[columns] @ out - self.equations.gram[columns] @ weight

    def replace(self, head: int, v_up: Float[np.ndarray, "L V"]) -> None:
        """Replaces v_up of one head."""
        self.heads.v_up[head] = v_up


@dataclass(frozen=True)
class RowsSearch:
    """Like `NormalSearch`, and keeps the residual Y − F·W up to date."""

    equations: Rows
    heads: HeadMaps
    missing: Float[np.ndarray, "M D"]

    def gradient(self, head: int) -> Float[np.ndarray, "L V"]:
        features = self.equations.features[:, self.heads.columns(head)]
        return features.T @ (self.missing @ self.heads.out[head].T)

    def replace(self, head: int, v_up: Float[np.ndarray, "L V"]) -> None:
        features = self.equations.features[:, self.heads.columns(head)]
        change = features @ (v_up - self.heads.v_up[head])
        self.missing[...] -= change @ self.heads.out[head]
        self.heads.v_up[head] = v_up


def ridge(
    gram: Float[np.ndarray, "F F"],
    product: Float[np.ndarray, "F D"],
    start: Float[np.ndarray, "F D"],
) -> Float[np.ndarray, "F D"]:
    """argmin ‖F·W − Y‖² + Σ ρ·(W − start)² from FᵀF and FᵀY, with a weight ρ for each feature."""
    rho = np.maximum(_pull(np.trace(gram), len(gram)), LIFT * np.diag(gram))
    lifted = gram.copy()
    lifted[np.diag_indices_from(lifted)] += rho
    return np.linalg.solve(lifted, product + rho[:, None] * start)


def _pull(trace: float, features: int) -> float:
    return RIDGE * float(trace) / features + 1e-30


def _narrow(
    x: Float[np.ndarray, "M F"], v_up: Float[np.ndarray, "N L V"]
) -> Float[np.ndarray, "M W"]:
    """Multiplies the L columns of every head by its v_up; the last column stays."""
    N, L, _ = v_up.shape
    heads = [x[:, h * L : (h + 1) * L] @ v_up[h] for h in range(N)]
    return np.concatenate([*heads, x[:, -1:]], axis=1)
