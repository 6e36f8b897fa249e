"""Values and output fitted to the original's: the second least squares after the closed form.

With attention and cached latents as they are, the output is linear in v_up · out and the bias. What
is fitted is what the layers that are already converted really give this one.
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

from kvjax.nn.rope import Turn
from kvjax.nn.transformer import Block
from kvjax.transmla.latent_layer import LatentLayer
from kvjax.transmla.layer import (
    HIGHEST,
    CacheMaps,
    Heads,
    QueryMaps,
    attention_weights,
    cache_entries,
    gqa_of,
    group_size,
    grouped,
    latent_scores,
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
        # Where most attention goes to one token, the features of a head hardly differ from each
        # other but for their size. Sums of fp32 products then have negative eigenvalues.
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


@dataclass(frozen=True)
class HeadMaps:
    """W of rank V a head: the products v_up · out one below the other, and the bias.

    Attributes:
        v_up, out, bias: [N, L, V], [N, V, D] and [D].
    """

    v_up: Float[np.ndarray, "N L V"]
    out: Float[np.ndarray, "N V D"]
    bias: Float[np.ndarray, " D"]

    @property
    def rows(self) -> Float[np.ndarray, "W D"]:
        """W behind the maps of the heads: N·V + 1 rows."""
        return np.concatenate([self.out.reshape(-1, len(self.bias)), self.bias[None]])

    @property
    def weight(self) -> Float[np.ndarray, "F D"]:
        """W itself."""
        N, L, _ = self.v_up.shape
        whole = np.empty((N * L + 1, len(self.bias)))
        np.matmul(self.v_up, self.out, out=whole[:-1].reshape(N, L, -1))
        whole[-1] = self.bias
        return whole

    def columns(self, head: int) -> slice:
        """The features of one head."""
        L = self.v_up.shape[1]
        return slice(head * L, (head + 1) * L)


@dataclass(frozen=True)
class Normal:
    """Of any number of rows: FᵀF and FᵀY."""

    gram: Float[np.ndarray, "F F"]
    product: Float[np.ndarray, "F D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        """FᵀF of some of the features."""
        return self.gram[columns, columns]

    def ridge(self, start: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
        """argmin ‖F·W − Y‖² + ρ·‖W − start‖², ρ relative to the mean of the diagonal."""
        return ridge(self.gram, self.product, start)

    def narrowed(self, v_up: Float[np.ndarray, "N L V"]) -> Normal:
        """The equations behind a map of every head from L to V numbers."""
        half = _narrow(self.gram, v_up)
        return Normal(_narrow(half.T, v_up), _narrow(self.product.T, v_up).T)

    def without_bias(self, bias: Float[np.ndarray, " D"]) -> Normal:
        """The equations of all but the last row of W; `ridge` leaves it as it starts."""
        gram, product = self.gram.copy(), self.product - self.gram[:, -1:] * bias
        gram[-1], gram[:, -1], product[-1] = 0.0, 0.0, 0.0
        return Normal(gram, product)

    def search(self, heads: HeadMaps) -> NormalSearch:
        """Takes the maps over, to replace v_up a head at a time."""
        return NormalSearch(self, heads)


@dataclass(frozen=True)
class Rows:
    """Of fewer rows than features, where FFᵀ is the smaller matrix; see `Normal`."""

    features: Float[np.ndarray, "M F"]
    target: Float[np.ndarray, "M D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        return self.features[:, columns].T @ self.features[:, columns]

    def ridge(self, start: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
        # (FᵀF + ρ)⁻¹ Fᵀ = Fᵀ (FFᵀ + ρ)⁻¹
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
    """Heads whose maps are replaced one after the other."""

    equations: Normal
    heads: HeadMaps

    def gradient(self, head: int) -> Float[np.ndarray, "L V"]:
        """Fᵀ(Y − F·W)·outᵀ for the features and the output of one head."""
        columns, out = self.heads.columns(head), self.heads.out[head].T
        each = self.heads.v_up @ (self.heads.out @ out)
        weight = np.concatenate([each.reshape(-1, out.shape[1]), self.heads.bias[None] @ out])
        return self.equations.product[columns] @ out - self.equations.gram[columns] @ weight

    def replace(self, head: int, v_up: Float[np.ndarray, "L V"]) -> None:
        """Another map of one head."""
        self.heads.v_up[head] = v_up


@dataclass(frozen=True)
class RowsSearch:
    """As `NormalSearch`, with what is missing so far, Y − F·W, at hand."""

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
    """Every head's L columns through its map to V; the last column as it is."""
    N, L, _ = v_up.shape
    heads = [x[:, h * L : (h + 1) * L] @ v_up[h] for h in range(N)]
    return np.concatenate([*heads, x[:, -1:]], axis=1)
