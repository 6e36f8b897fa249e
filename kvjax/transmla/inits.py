"""Ways to factor a K or V projection, and checks of the factors.

An init is a function (weight [I, K, H] fp64, repeats G = N/K, rope) → `Factors`. I is D, plus one
row for the bias if there is one; `rope` is None for values and for layers without positions. The
model is the same with every init before training; they lead to different models when trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kvjax.config import RopeConfig
from kvjax.transmla.rotary import rotary_pairs

EXACT = 1e-9  # largest relative error of factors; fp64 algebra stays far below it

Init = Callable[[np.ndarray, int, RopeConfig | None], "Factors"]
"""weight, repeats and rope → factors; see the docstring of this module."""


@dataclass(frozen=True)
class Factors:
    """W · repeat = down · up for one K or V projection; fp64.

    Attributes:
        down: [I, C, X], from the input to the cached latents: C heads of X numbers. The last row is
            the bias where the projection has one.
        up: [C, X, N/C, H], from each latent head to the query heads that read it.
    """

    down: Float[np.ndarray, "I C X"]
    up: Float[np.ndarray, "C X M H"]

    def product(self) -> Float[np.ndarray, "I N H"]:
        """The projection for all N = C · M query heads."""
        product = np.einsum("icx,cxmh->icmh", self.down, self.up, optimize=True)
        return product.reshape(len(product), -1, product.shape[-1])

    def wide(self) -> Factors:
        """The same product with one latent head; `up` gets the C blocks on its diagonal."""
        C, X, M, H = self.up.shape
        up = np.zeros((C, X, C, M, H))
        for head in range(C):
            up[head, :, head] = self.up[head]
        return Factors(self.down.reshape(-1, 1, C * X), up.reshape(1, C * X, C * M, H))


def svd_global(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One SVD over all KV heads: the paper's init (arXiv 2502.07864v2, equations 8 to 10)."""
    rows, K, H = weight.shape
    left, right = balanced_svd(weight.reshape(rows, K * H), repeats)
    return Factors(left[:, None], _to_query_heads(right.reshape(K * H, K, H), repeats))


def svd_per_head(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One SVD for each KV head, as in the published code: every KV head has its own latent."""
    left_KIX, right_KXH = balanced_svd(np.swapaxes(weight, 0, 1), repeats)
    return Factors(np.swapaxes(left_KIX, 0, 1), np.repeat(right_KXH[:, :, None], repeats, axis=2))


def identity(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """Caches the keys or values themselves; `up` is a 0/1 selector (the paper's ablation)."""
    _, K, H = weight.shape
    return Factors(weight, np.tile(np.eye(H)[None, :, None], (K, 1, repeats, 1)))


def svd_complex(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One complex SVD for each rotary frequency, which commutes with RoPE.

    RoPE multiplies κ[t, k, i] = k[t, k, i] + i·k[t, k, i + R/2] by e^(i·t·θ_i), the same for every
    head k. So a complex map over the heads of one frequency can come before or after RoPE. The
    latent has K heads of H numbers, rotated like keys. Components without RoPE are factored by one
    real SVD.
    """
    rows, K, H = weight.shape
    real, imag = rotary_pairs(rope)
    down, up = np.zeros((rows, K, H)), np.zeros((K, H, K, H))
    turning_FIK = np.moveaxis(weight[..., real] + 1j * weight[..., imag], -1, 0)
    # As a real matrix, a complex map repeats each number of `right` in two rows.
    left_FIJ, right_FJK = balanced_svd(turning_FIK, 2 * repeats)
    down[..., real] = np.moveaxis(np.real(left_FIJ), 0, -1)
    down[..., imag] = np.moveaxis(np.imag(left_FIJ), 0, -1)
    up[:, real, :, real] = up[:, imag, :, imag] = np.real(right_FJK)
    up[:, real, :, imag], up[:, imag, :, real] = np.imag(right_FJK), -np.imag(right_FJK)

    still = H - 2 * len(real)
    left, right = balanced_svd(weight[..., H - still :].reshape(rows, K * still), repeats)
    down[..., H - still :] = left.reshape(rows, K, still)
    up[:, H - still :, :, H - still :] = right.reshape(K, still, K, still)
    return Factors(down.reshape(rows, 1, K * H), _to_query_heads(up.reshape(K * H, K, H), repeats))


INITS: dict[str, Init] = {
    init.__name__: init for init in (svd_global, svd_per_head, identity, svd_complex)
}


def resolve_init(init: str | Init) -> Init:
    """The init with that name; a function is returned unchanged.

    Raises:
        ValueError: an unknown name.
    """
    if callable(init):
        return init
    if init not in INITS:
        raise ValueError(f"init {init!r} is not one of {', '.join(INITS)}, nor a function")
    return INITS[init]


def _to_query_heads(right_XKH: np.ndarray, repeats: int) -> np.ndarray:
    """[X, K, H] → `up` of one latent head, [1, X, N, H]."""
    return np.repeat(right_XKH, repeats, axis=1)[None]


def balanced_svd(matrix: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors, of equal norm, of `matrix` with its columns repeated `repeats` times.

    The repeated matrix has the singular values √repeats · S, and the right singular vectors of
    `matrix`, repeated and divided by √repeats. So the wide matrix is never built (TransMLA v2,
    section 3.2).

    Examples:
        >>> weight = np.random.default_rng(0).standard_normal((6, 4))
        >>> left, right = kvjax.transmla.balanced_svd(weight, repeats=3)
        >>> np.allclose(left @ right, weight)
        True
        >>> bool(np.isclose(np.linalg.norm(left), np.linalg.norm(np.tile(right, 3))))
        True

    Args:
        matrix: [..., I, W], real or complex.

    Returns:
        left [..., I, W] = U·(√repeats·S)^½ and right [..., W, W], not repeated, with
        left · right = matrix; zero-padded where I < W. The largest entry of each row of `right`
        is real and positive, so that the factors are the same on every platform.
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
    """Checks the factors of an init that the user wrote.

    Raises:
        ValueError: shapes that the cache cannot hold, or a product that is not the weight.
    """
    rows, K, H = weight.shape
    shapes = {
        C: ((rows, C, K * H // C), (C, K * H // C, K * repeats // C, H)) for C in (1, K)
    }  # one latent head, or one for each KV head: K·H numbers a token in both cases
    got = factors.down.shape, factors.up.shape
    if got not in shapes.values():
        expected = " or ".join(map(str, shapes.values()))
        raise ValueError(f"the init gave down and up of shapes {got}, expected {expected}")
    # Four random inputs show a wrong product, and cost less than the product itself.
    probe = np.random.default_rng(0).standard_normal((4, rows))
    latents = np.einsum("bi,icx->bcx", probe, factors.down)
    product = np.einsum("bcx,cxmh->bcmh", latents, factors.up).reshape(4, K * repeats, H)
    expected = np.repeat(np.einsum("bi,ikh->bkh", probe, weight), repeats, axis=1)
    error = np.abs(product - expected).max() / max(np.abs(expected).max(), 1e-300)
    if not error <= EXACT:
        raise ValueError(f"the init's down · up differs from the weight by {error:.1e} (relative)")


def commutes_with_rope(up: Float[np.ndarray, "C X M H"], rope: RopeConfig | None) -> bool:
    """Whether RoPE on the latent, taken as heads of H numbers, equals RoPE on the keys made of it.

    Tested with one random angle for each frequency: only complex-linear maps within each frequency
    pass.
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
    """Whether every key component is one latent component, so that latents are the keys."""
    ones = (up == 1).sum(axis=1) == 1
    return bool(ones.all() and np.isin(up, (0, 1)).all())
