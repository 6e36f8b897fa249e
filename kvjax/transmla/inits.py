"""Ways to factor a projection: all the same function at step 0, they differ in what training does.

An init is any function (weight [I, K, H] fp64, repeats G = N/K, rope) → Factors; `rope` is None for
values and for layers without positions. I is D, plus one row for the bias where there is one.
"""

from collections.abc import Callable

import numpy as np

from kvjax.config import RopeConfig
from kvjax.transmla.factors import Factors, balanced_svd, rotary_pairs

Init = Callable[[np.ndarray, int, RopeConfig | None], Factors]


def svd_global(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One SVD over all KV heads: the paper's init (arXiv 2502.07864v2, equations 8 to 10)."""
    rows, K, H = weight.shape
    left, right = balanced_svd(weight.reshape(rows, K * H), repeats)
    return Factors(left[:, None], _to_query_heads(right.reshape(K * H, K, H), repeats))


def svd_per_head(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One SVD for each KV head: block-diagonal, so that each head keeps a latent of its own."""
    left_KIX, right_KXH = balanced_svd(np.swapaxes(weight, 0, 1), repeats)
    return Factors(np.swapaxes(left_KIX, 0, 1), np.repeat(right_KXH[:, :, None], repeats, axis=2))


def identity(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """The latent is the keys or values themselves, `up` a 0/1 selector (the paper's ablation)."""
    _, K, H = weight.shape
    return Factors(weight, np.tile(np.eye(H)[None, :, None], (K, 1, repeats, 1)))


def svd_complex(weight: np.ndarray, repeats: int, rope: RopeConfig | None) -> Factors:
    """One SVD for each rotary frequency, heads mixed and pairs kept: commutes with RoPE.

    RoPE multiplies κ[t, k, i] = k[t, k, i] + i·k[t, k, i + R/2] by e^(i·t·θ_i) for every head k
    alike, so a complex map over the heads of one frequency may stand on either side of it. The
    latent is laid out as K rotating heads of H numbers; components that RoPE leaves alone are
    factored by one real SVD.
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
    """The init of that name; a function is taken as it is.

    Raises:
        ValueError: an unknown name.
    """
    if callable(init):
        return init
    if init not in INITS:
        raise ValueError(f"init {init!r} is none of {', '.join(INITS)}, nor a function")
    return INITS[init]


def _to_query_heads(right_XKH: np.ndarray, repeats: int) -> np.ndarray:
    """[X, K, H] → `up` of one latent head, [1, X, N, H]."""
    return np.repeat(right_XKH, repeats, axis=1)[None]
