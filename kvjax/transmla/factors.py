"""A projection as the product of two factors, and what makes a pair of factors usable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kvjax.config import RopeConfig

EXACT = 1e-9  # relative error that fp64 algebra stays far below


@dataclass(frozen=True)
class Factors:
    """W · repeat = down · up for one K or V projection; fp64.

    I input rows: the D of the model and, where the projection has a bias, one more that holds it.

    Attributes:
        down: [I, C, X], input to C latent heads of X numbers: what the cache holds.
        up: [C, X, N/C, H], each latent head to the query heads that read it.
    """

    down: Float[np.ndarray, "I C X"]
    up: Float[np.ndarray, "C X M H"]

    def product(self) -> Float[np.ndarray, "I N H"]:
        """The projection for all N = C · M query heads."""
        product = np.einsum("icx,cxmh->icmh", self.down, self.up, optimize=True)
        return product.reshape(len(product), -1, product.shape[-1])

    def wide(self) -> Factors:
        """The same product with one latent head: the C blocks of `up` on a diagonal."""
        C, X, M, H = self.up.shape
        up = np.zeros((C, X, C, M, H))
        for head in range(C):
            up[head, :, head] = self.up[head]
        return Factors(self.down.reshape(-1, 1, C * X), up.reshape(1, C * X, C * M, H))


def balanced_svd(matrix: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of equal norm of `matrix` with its columns repeated `repeats` times.

    The singular values of the repeated matrix are √repeats · S, and its right vectors those of
    `matrix` repeated and divided by √repeats; so the wide matrix is never built (TransMLA v2,
    section 3.2).

    Args:
        matrix: [..., I, W], real or complex.

    Returns:
        left [..., I, W] = U·(√repeats·S)^½ and right [..., W, W], not repeated, with
        left · right = matrix; zero-padded where I < W. The largest entry of each row of `right`
        is real and positive, so that the factors don't depend on the platform's LAPACK.
    """
    width = matrix.shape[-1]
    if matrix.size == 0:
        return matrix, np.zeros((*matrix.shape[:-2], width, width))
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    largest = np.argmax(np.abs(vh), axis=-1, keepdims=True)
    pivot = np.take_along_axis(vh, largest, axis=-1)
    phase = np.swapaxes(pivot / np.abs(pivot), -1, -2)  # [..., 1, W]
    root = np.sqrt(np.sqrt(repeats) * s)
    left = u * phase * root[..., None, :]
    right = vh * np.swapaxes(phase.conj() * root[..., None, :], -1, -2) / np.sqrt(repeats)
    missing = width - s.shape[-1]
    pad = [(0, 0)] * (matrix.ndim - 2)
    return np.pad(left, [*pad, (0, 0), (0, missing)]), np.pad(right, [*pad, (0, missing), (0, 0)])


def check_factors(factors: Factors, weight: Float[np.ndarray, "I K H"], repeats: int) -> None:
    """Refuses factors of another shape than the cache's, or of another product than the weight.

    Raises:
        ValueError: says what is wrong; possible only with a user's own init.
    """
    rows, K, H = weight.shape
    shapes = {
        C: ((rows, C, K * H // C), (C, K * H // C, K * repeats // C, H)) for C in (1, K)
    }  # one latent head, or one a KV head; K·H numbers a token in either case
    got = factors.down.shape, factors.up.shape
    if got not in shapes.values():
        expected = " or ".join(map(str, shapes.values()))
        raise ValueError(f"the init gave down and up of shapes {got}, expected {expected}")
    probe = np.random.default_rng(0).standard_normal((4, rows))
    latents = np.einsum("bi,icx->bcx", probe, factors.down)
    product = np.einsum("bcx,cxmh->bcmh", latents, factors.up).reshape(4, K * repeats, H)
    expected = np.repeat(np.einsum("bi,ikh->bkh", probe, weight), repeats, axis=1)
    error = np.abs(product - expected).max() / max(np.abs(expected).max(), 1e-300)
    if not error <= EXACT:
        raise ValueError(f"the init's down · up differs from the weight by {error:.1e} (relative)")


def rotary_pairs(rope: RopeConfig | None) -> tuple[np.ndarray, np.ndarray]:
    """[R/2] head components that are the real and the imaginary parts of what RoPE turns."""
    index = np.arange(0 if rope is None else rope.dim)
    if rope is not None and rope.interleaved:
        return index[::2], index[1::2]
    return index[: len(index) // 2], index[len(index) // 2 :]


def commutes_with_rope(up: Float[np.ndarray, "C X M H"], rope: RopeConfig | None) -> bool:
    """Whether rotating the latent, seen as heads of H numbers, rotates the up-projected keys.

    Tried with one random angle a frequency: only complex-linear maps within each frequency pass.
    """
    H = up.shape[-1]
    if rope is None:
        return True
    if up.shape[1] % H:
        return False
    real, imag = rotary_pairs(rope)
    angle = np.random.default_rng(0).uniform(0.3, 2.8, len(real))
    turn = np.eye(H)  # acts on row vectors from the right
    turn[real, real] = turn[imag, imag] = np.cos(angle)
    turn[real, imag], turn[imag, real] = np.sin(angle), -np.sin(angle)
    heads = up.reshape(up.shape[0], -1, H, *up.shape[2:])
    before = np.einsum("ab,cjbmh->cjamh", turn, heads)
    after = heads @ turn
    return bool(np.abs(before - after).max() <= EXACT * np.abs(up).max())


def is_selector(up: Float[np.ndarray, "C X M H"]) -> bool:
    """Whether the latents are the keys themselves: every key component one latent component."""
    ones = (up == 1).sum(axis=1) == 1
    return bool(ones.all() and np.isin(up, (0, 1)).all())
