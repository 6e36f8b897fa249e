"""The equations F·W = Y of `refit_outputs` in two forms, and their ridge regression; all in fp64.

F has the features of all N heads, L columns each, and a column of ones. W has the products
v_up · out of all heads one above the other, and the bias in its last row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from kvjax.transmla.layer import HIGHEST

Group = tuple[jax.Array, jax.Array]
"""F [m, F] and Y [m, D] of some rows, in fp32 on the device."""


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
        return head_columns(head, self.v_up.shape[1])


def head_columns(head: int, width: int) -> slice:
    """The columns of F that belong to one head, `width` for each head."""
    return slice(head * width, (head + 1) * width)


@dataclass(frozen=True)
class Normal:
    """The equations as FᵀF, FᵀY and ‖Y‖², for any number of rows."""

    gram: Float[np.ndarray, "F F"]
    product: Float[np.ndarray, "F D"]
    square: float

    @classmethod
    def of(cls, groups: Sequence[Group], maps: Float[np.ndarray, "N L V"], width: int) -> Normal:
        """The equations of all groups, with the features of every head multiplied by a map.

        Args:
            maps: to white coordinates. Products in fp32 are then exact enough, and are summed in
                fp64.
            width: D.
        """
        size = maps.shape[0] * maps.shape[2] + 1
        gram, product, square = np.zeros((size, size)), np.zeros((size, width)), 0.0
        narrow = jnp.asarray(maps, jnp.float32)
        for f, y in groups:
            own_gram, own_product, own_square = _products(f, y, narrow)
            gram += np.asarray(own_gram)
            product += np.asarray(own_product)
            square += float(own_square)
        return cls(gram, product, square)

    @property
    def empty(self) -> bool:
        """Whether there are no rows: the column of ones has no length."""
        return bool(self.gram[-1, -1] == 0.0 and self.square == 0.0)

    def error(self, weight: Float[np.ndarray, "F D"]) -> float:
        """‖F·W − Y‖²."""
        return self.square + float(np.vdot(weight, self.gram @ weight - 2 * self.product))

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        """FᵀF of some features."""
        return self.gram[columns, columns]

    @property
    def normal(self) -> Normal:
        """The equations in this form."""
        return self

    def ridge(self, start: Float[np.ndarray, "F D"], pull: float) -> Float[np.ndarray, "F D"]:
        """argmin ‖F·W − Y‖² + pull·‖W − start‖²."""
        return start + lifted_solve(self.gram, self.product - self.gram @ start, pull)

    def narrowed(self, v_up: Float[np.ndarray, "N L V"]) -> Normal:
        """The equations of `HeadMaps.rows`: features of L numbers a head become V numbers."""
        half = _narrow(self.gram, v_up)
        return Normal(_narrow(half.T, v_up), _narrow(self.product.T, v_up).T, self.square)

    def without_bias(self, bias: Float[np.ndarray, " D"]) -> Normal:
        """The equations with a fixed bias: `ridge` keeps the last row of its start."""
        gram, product = self.gram.copy(), self.product - self.gram[:, -1:] * bias
        square = self.square - float(bias @ (self.product[-1] + product[-1]))
        gram[-1], gram[:, -1], product[-1] = 0.0, 0.0, 0.0
        return Normal(gram, product, square)

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

    @classmethod
    def of(cls, groups: Sequence[Group], maps: Float[np.ndarray, "N L V"], width: int) -> Rows:
        f, y = np.zeros((0, maps.shape[0] * maps.shape[1] + 1)), np.zeros((0, width))
        if groups:
            f, y = (np.concatenate(part) for part in zip(*groups, strict=True))
        return cls(_narrow(f.astype(np.float64), maps), y.astype(np.float64))

    @property
    def empty(self) -> bool:
        return len(self.features) == 0

    def error(self, weight: Float[np.ndarray, "F D"]) -> float:
        return float(((self.features @ weight - self.target) ** 2).sum())

    @property
    def normal(self) -> Normal:
        f, y = self.features, self.target
        return Normal(f.T @ f, f.T @ y, float((y**2).sum()))

    def ridge(self, start: Float[np.ndarray, "F D"], pull: float) -> Float[np.ndarray, "F D"]:
        # (FᵀF + ρ)⁻¹ Fᵀ = Fᵀ (FFᵀ + ρ)⁻¹: the matrix to solve with is [M, M].
        missing = self.target - self.features @ start
        return start + self.features.T @ lifted_solve(
            self.features @ self.features.T, missing, pull
        )

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


@jax.jit
def _products(
    f: Float[Array, "M F"], y: Float[Array, "M D"], maps: Float[Array, "N L V"]
) -> tuple[Float[Array, "W W"], Float[Array, "W D"], Float[Array, ""]]:
    """FᵀF, FᵀY and ‖Y‖², with the features of every head multiplied by a map."""
    N, L, V = maps.shape
    narrow = jnp.einsum("mnl,nlv->mnv", f[:, :-1].reshape(-1, N, L), maps, precision=HIGHEST)
    f = jnp.concatenate([narrow.reshape(-1, N * V), f[:, -1:]], axis=1)
    gram = jnp.einsum("mf,mg->fg", f, f, precision=HIGHEST)
    return gram, jnp.einsum("mf,md->fd", f, y, precision=HIGHEST), jnp.sum(y * y)


def merged(a: Equations, b: Equations) -> Equations:
    """The equations of both; their forms are the same."""
    if isinstance(a, Rows):
        assert isinstance(b, Rows)
        features = np.concatenate([a.features, b.features])
        return Rows(features, np.concatenate([a.target, b.target]))
    assert isinstance(b, Normal)
    return Normal(a.gram + b.gram, a.product + b.product, a.square + b.square)


def lifted_solve(
    gram: Float[np.ndarray, "F F"], product: Float[np.ndarray, "F D"], pull: float
) -> Float[np.ndarray, "F D"]:
    """(gram + pull)⁻¹ · product.

    Rounding can leave eigenvalues of `gram` below −pull. Then the pull is raised tenfold until the
    matrix is positive.
    """
    while True:
        lifted = gram.copy()
        lifted[np.diag_indices_from(lifted)] += pull
        try:
            factors = scipy.linalg.cho_factor(lifted, lower=True, overwrite_a=True)
            return scipy.linalg.cho_solve(factors, product)
        except np.linalg.LinAlgError:
            pull = 10 * pull + 1e-12 * float(np.diag(gram).max(initial=0.0)) + 1e-300


def _narrow(
    x: Float[np.ndarray, "M F"], v_up: Float[np.ndarray, "N L V"]
) -> Float[np.ndarray, "M W"]:
    """Multiplies the L columns of every head by its v_up; the last column stays."""
    N, L, _ = v_up.shape
    heads = [x[:, h * L : (h + 1) * L] @ v_up[h] for h in range(N)]
    return np.concatenate([*heads, x[:, -1:]], axis=1)
