"""RoRoPE: which components of the keys go on rotating, in which basis (arXiv 2502.07864v5, 4.1).

RoPE multiplies κ[t, i, j] = k[t, j, i] + i·k[t, j, i + R/2], frequency i of KV head j, by
e^(i·t·θ_i) for every head alike. The keys of all heads are therefore one key of f·K complex
components, in which any invertible map within one frequency leaves the scores as they are if the
queries get its inverse. A basis that gathers the energy lets RoPE stay on a few components only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Int

from kvjax.config import GQAConfig, RopeConfig, SelectedPairs
from kvjax.transmla.inits import rotary_pairs

Rotation = Callable[[Complex[np.ndarray, "g g"]], Complex[np.ndarray, "g g"]]
"""E[κᴴκ] of one group of components → a unitary basis, columns by falling energy."""


def complex_rotation(covariance: Complex[np.ndarray, "g g"]) -> Complex[np.ndarray, "g g"]:
    """Eigenvectors of the Hermitian covariance: the most energy that a unitary basis gathers."""
    return _by_energy(np.linalg.eigh(covariance)[1])


def real_rotation(covariance: Complex[np.ndarray, "g g"]) -> Complex[np.ndarray, "g g"]:
    """Eigenvectors of its real part, Σ (Re κᵀ Re κ + Im κᵀ Im κ): the published RoRoPE."""
    return _by_energy(np.linalg.eigh(np.real(covariance))[1]).astype(np.complex128)


def _by_energy(vectors: np.ndarray) -> np.ndarray:
    """Columns from the largest eigenvalue down, their largest entry real and positive."""
    columns = vectors[:, ::-1]
    pivot = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return columns * (np.abs(pivot) / pivot)


@dataclass(frozen=True)
class KeyStatistics:
    """What the choice of a basis reads, all of one layer.

    Attributes:
        keys: E[conj(κ_a)·κ_b] [f·K, f·K], components in the order (frequency, KV head).
        queries: E|χ|² [f·K], summed over the query heads of each KV head.
        turning: E_Δ[e^(iΔθ)] [f], Δ distributed as the attention over distances.
        spread: E_Δ|e^(iΔθ) − c|² [f] for the constant c that stands for a rotation.
        num_heads: K.
    """

    keys: Complex[np.ndarray, "C C"]
    queries: Float[np.ndarray, " C"]
    turning: Complex[np.ndarray, " f"]
    spread: Float[np.ndarray, " f"]
    num_heads: int


@dataclass(frozen=True)
class Basis:
    """A basis of the f·K complex components, and those of its vectors that rotate.

    Attributes:
        vectors: columns; κ' = κ · vectors.
        kept: columns that go on rotating.
        pairs: the frequency of each of them, an index into RoPE's.
    """

    vectors: Complex[np.ndarray, "C C"]
    kept: tuple[int, ...]
    pairs: tuple[int, ...]


Placement = Callable[[KeyStatistics, Rotation, int], Basis]
"""Statistics, rotation and the number of rotating components → a basis."""


def by_energy(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
    """The components whose rotation matters most, over all frequencies.

    What is lost where a component stops rotating is its energy times the spread of its rotation:
    E|κ|² · E|χ|² · E_Δ|e^(iΔθ) − c|². A frequency may be kept more than once, or not at all.
    """
    K = statistics.num_heads
    vectors = _blocks(statistics.keys, rotation, K)
    energy = np.einsum("ac,ab,bc->c", vectors.conj(), statistics.keys, vectors).real
    queries = np.abs(vectors).T ** 2 @ statistics.queries
    loss = energy * queries * np.repeat(statistics.spread, K)
    kept = tuple(sorted(int(c) for c in np.argsort(-loss, kind="stable")[:count]))
    return Basis(vectors, kept, tuple(c // K for c in kept))


def every(stride: int) -> Placement:
    """The first component of every `stride`-th frequency: what DeepSeek's layout can express."""

    def place(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
        K = statistics.num_heads
        pairs = tuple(stride * i for i in range(count))
        return Basis(_blocks(statistics.keys, rotation, K), tuple(K * i for i in pairs), pairs)

    return place


def fold(size: int) -> Placement:
    """The published FreqFold: `size` neighbouring frequencies share one basis, an approximation.

    Of each group the first size·count/f components are kept; component m of a group that starts
    at frequency i rotates at frequency i + m·f/count.
    """

    def place(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
        f, K = len(statistics.turning), statistics.num_heads
        if size not in possible_folds(f, count):
            raise ValueError(
                f"FreqFold {size} of {f} frequencies cannot keep {count} of them, expected one "
                f"of {possible_folds(f, count)}"
            )
        stride = f // count
        vectors = _blocks(statistics.keys, rotation, size * K)
        kept = [
            (group * size * K + m, group * size + m * stride)
            for group in range(f // size)
            for m in range(size // stride)
        ]
        return Basis(vectors, *(tuple(index) for index in zip(*kept, strict=True)))

    return place


def possible_folds(frequencies: int, count: int) -> list[int]:
    """FreqFolds that keep `count` components: divisors of f that are multiples of f / count."""
    if count < 1 or frequencies % count:
        return []
    stride = frequencies // count
    return [m for m in range(stride, frequencies + 1, stride) if frequencies % m == 0]


def _blocks(covariance: np.ndarray, rotation: Rotation, size: int) -> np.ndarray:
    """The rotations of all groups of `size` components, on a diagonal."""
    vectors = np.zeros_like(covariance)
    for start in range(0, len(covariance), size):
        block = slice(start, start + size)
        vectors[block, block] = rotation(covariance[block, block])
    return vectors


@dataclass(frozen=True)
class PartialRope:
    """Keys and queries in a basis of which a part rotates; fp64.

    q·RoPE·k ≈ q_rope·RoPE·k_rope + q_nope·k_nope, equal where everything rotates.

    Attributes:
        key_rope, key_nope: [K·H, R] and [K·H, n], from the keys of all heads, R + n = K·H.
        query_rope, query_nope: [N, H, R] and [N, H, n], from one head's query.
        rope: of the R rotating components, the two halves of all pairs; None for R = 0.
    """

    key_rope: Float[np.ndarray, "W R"]
    key_nope: Float[np.ndarray, "W n"]
    query_rope: Float[np.ndarray, "N H R"]
    query_nope: Float[np.ndarray, "N H n"]
    rope: RopeConfig | None

    @property
    def joint(self) -> Float[np.ndarray, "X Y"]:
        """[2·K·H, n + K·H], the map from [k ; v] to [k_nope ; v]."""
        W, n = self.key_nope.shape
        joint = np.zeros((2 * W, n + W))
        joint[:W, :n], joint[W:, n:] = self.key_nope, np.eye(W)
        return joint


def partial_rope(
    base: GQAConfig, basis: Basis, constants: Complex[np.ndarray, " f"]
) -> PartialRope:
    """The real matrices of a basis.

    Args:
        base: the attention whose keys are split.
        constants: c of each frequency, which stands for e^(iΔθ) where nothing rotates.
    """
    N, K, H = base.num_heads, base.num_kv_heads, base.head_dim
    real, imag = component_rows(base)
    inverse = np.linalg.inv(basis.vectors).conj().T
    keys = np.zeros((K * H, 2 * len(basis.vectors)))
    keys[real], keys[imag] = _real_map(basis.vectors)
    queries = [np.zeros((K * H, keys.shape[1])) for _ in range(2)]
    factors = (np.ones(len(inverse)), np.repeat(constants, K))
    for wide, factor in zip(queries, factors, strict=True):
        wide[real], wide[imag] = _real_map(factor[:, None] * inverse)
    rotating, still = (
        np.repeat(wide.reshape(K, H, -1), N // K, axis=0) for wide in queries
    )  # a query of KV head j has components of head j only
    kept = np.asarray(basis.kept, np.int64)
    other = np.setdiff1d(np.arange(len(basis.vectors)), kept)
    C = len(basis.vectors)
    kept, other = np.concatenate([kept, C + kept]), np.concatenate([other, C + other])
    plain = np.setdiff1d(np.arange(K * H), np.concatenate([real, imag]))
    unit = np.eye(K * H)[:, plain]
    plain_queries = np.repeat(unit.reshape(K, H, -1), N // K, axis=0)
    rope = None
    if len(basis.kept) and base.rope is not None:
        rope = RopeConfig(len(kept), scaling=SelectedPairs(base.rope, basis.pairs))
    return PartialRope(
        keys[:, kept],
        np.concatenate([keys[:, other], unit], axis=1),
        rotating[..., kept],
        np.concatenate([still[..., other], plain_queries], axis=2),
        rope,
    )


def component_rows(base: GQAConfig) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
    """Rows of [K·H] that hold real and imaginary parts of the components (frequency, KV head)."""
    starts = np.arange(base.num_kv_heads)[None] * base.head_dim
    real, imag = rotary_pairs(base.rope)
    return (real[:, None] + starts).reshape(-1), (imag[:, None] + starts).reshape(-1)


def _real_map(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows for real and for imaginary parts of z ↦ z · matrix, columns (real, imaginary)."""
    a, b = np.real(matrix), np.imag(matrix)
    return np.concatenate([a, b], axis=1), np.concatenate([-b, a], axis=1)
