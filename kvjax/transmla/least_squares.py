"""F·W = Y by least squares, in the form that is smaller: normal equations, or the rows themselves.

[M, F] · [F, D] = [M, D], all fp64. The features are the latents of N heads, L numbers each, and a
column of ones: F = N·L + 1. Both forms have the same minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RIDGE = 1e-4  # pull towards the start, relative to the mean of the diagonal


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
    """argmin ‖F·W − Y‖² + ρ·‖W − start‖² from FᵀF and FᵀY."""
    rho = _pull(np.trace(gram), len(gram))
    lifted = gram + rho * np.eye(len(gram))
    return np.linalg.solve(lifted, product + rho * start)


def _pull(trace: float, features: int) -> float:
    return RIDGE * float(trace) / features + 1e-30


def _narrow(
    x: Float[np.ndarray, "M F"], v_up: Float[np.ndarray, "N L V"]
) -> Float[np.ndarray, "M W"]:
    """Every head's L columns through its map to V; the last column as it is."""
    N, L, _ = v_up.shape
    heads = [x[:, h * L : (h + 1) * L] @ v_up[h] for h in range(N)]
    return np.concatenate([*heads, x[:, -1:]], axis=1)
