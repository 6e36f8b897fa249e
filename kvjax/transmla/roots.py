"""Square roots of second-moment matrices that survive outliers, and their inverses.

Real models have channels a thousand times larger than others, and directions that a short text
never takes. `Root` scales every channel to the same size before it takes eigenvalues, and lifts
eigenvalues that are only rounding errors. In the coordinates root · w a least squares is white: all
channels count alike, whatever their sizes and units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

FLOOR = 1e-10  # least eigenvalue of a matrix with unit diagonal, whose mean eigenvalue is 1
DEAD = 1e-12  # least diagonal entry relative to the largest: a channel a million times smaller


@dataclass(frozen=True)
class Root:
    """A root R of a positive matrix G ≈ RᵀR, and its inverse.

    Attributes:
        root, inverse: [n, n] R and R⁻¹; fp64.
    """

    root: Float[np.ndarray, "n n"]
    inverse: Float[np.ndarray, "n n"]

    @classmethod
    def of(cls, gram: Float[np.ndarray, "n n"], floor: float = FLOOR, dead: float = DEAD) -> Root:
        """The root of a Gram matrix.

        Args:
            gram: symmetric; eigenvalues may be 0, or below 0 by rounding.
            floor: least eigenvalue after the diagonal was scaled to 1. Use 1e-6 for products that
                were rounded to fp32.
            dead: least diagonal entry relative to the largest.
        """
        squares = np.diag(gram)
        size = np.sqrt(np.maximum(squares, dead * squares.max(initial=0.0) + 1e-60))
        values, vectors = np.linalg.eigh(gram / np.outer(size, size))
        scale = np.sqrt(np.maximum(values, floor))
        return cls(scale[:, None] * (vectors.T * size), (vectors / size[:, None]) / scale)
