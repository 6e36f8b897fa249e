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
class Normal:
    """Of any number of rows: FᵀF and FᵀY."""

    gram: Float[np.ndarray, "F F"]
    product: Float[np.ndarray, "F D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        """FᵀF of some of the features."""
        return self.gram[columns, columns]

    def at(self, weight: Float[np.ndarray, "F D"]) -> NormalAt:
        """Where a search begins; it takes the weight over."""
        return NormalAt(self, weight)

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


@dataclass(frozen=True)
class Rows:
    """Of fewer rows than features, where FFᵀ is the smaller matrix; see `Normal`."""

    features: Float[np.ndarray, "M F"]
    target: Float[np.ndarray, "M D"]

    def block(self, columns: slice) -> Float[np.ndarray, "C C"]:
        return self.features[:, columns].T @ self.features[:, columns]

    def at(self, weight: Float[np.ndarray, "F D"]) -> RowsAt:
        """Where a search begins; it takes the weight over."""
        return RowsAt(self, weight, self.target - self.features @ weight)

    def ridge(self, start: Float[np.ndarray, "F D"]) -> Float[np.ndarray, "F D"]:
        # (FᵀF + ρ)⁻¹ Fᵀ = Fᵀ (FFᵀ + ρ)⁻¹
        rho = _pull(np.sum(self.features**2), self.features.shape[1])
        gram = self.features @ self.features.T
        gram[np.diag_indices_from(gram)] += rho
        change = self.features.T @ np.linalg.solve(gram, self.target - self.features @ start)
        change += start
        return change

    def narrowed(self, v_up: Float[np.ndarray, "N L V"]) -> Rows:
        return Rows(_narrow(self.features, v_up), self.target)

    def without_bias(self, bias: Float[np.ndarray, " D"]) -> Rows:
        features = self.features.copy()
        features[:, -1] = 0.0
        return Rows(features, self.target - self.features[:, -1:] * bias)


Equations = Normal | Rows


@dataclass(frozen=True)
class NormalAt:
    """A weight whose parts are replaced one after the other."""

    equations: Normal
    weight: Float[np.ndarray, "F D"]

    def gradient(self, columns: slice) -> Float[np.ndarray, "C D"]:
        """Fᵀ(Y − F·W) of some of the features."""
        return self.equations.product[columns] - self.equations.gram[columns] @ self.weight

    def replace(self, columns: slice, part: Float[np.ndarray, "C D"]) -> None:
        """Other rows of W for some of the features."""
        self.weight[columns] = part


@dataclass(frozen=True)
class RowsAt:
    """As `NormalAt`, with what is missing so far, Y − F·W, at hand."""

    equations: Rows
    weight: Float[np.ndarray, "F D"]
    missing: Float[np.ndarray, "M D"]

    def gradient(self, columns: slice) -> Float[np.ndarray, "C D"]:
        """Fᵀ(Y − F·W) of some of the features."""
        return self.equations.features[:, columns].T @ self.missing

    def replace(self, columns: slice, part: Float[np.ndarray, "C D"]) -> None:
        """Other rows of W for some of the features."""
        features = self.equations.features[:, columns]
        self.missing[...] -= features @ (part - self.weight[columns])
        self.weight[columns] = part


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
    return RIDGE * trace / features + 1e-30


def _narrow(
    x: Float[np.ndarray, "M F"], v_up: Float[np.ndarray, "N L V"]
) -> Float[np.ndarray, "M W"]:
    """Every head's L columns through its map to V; the last column as it is."""
    N, L, _ = v_up.shape
    heads = [x[:, h * L : (h + 1) * L] @ v_up[h] for h in range(N)]
    return np.concatenate([*heads, x[:, -1:]], axis=1)
