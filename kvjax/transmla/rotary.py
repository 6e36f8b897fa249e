"""RoRoPE: a basis of the keys in which few components need RoPE (arXiv 2502.07864v5, 4.1).

RoPE multiplies κ[t, i, j] = k[t, j, i] + i·k[t, j, i + R/2], frequency i of KV head j, by
e^(i·t·θ_i), the same for every head. So the keys of all heads are one key of f·K complex
components. An invertible map within one frequency leaves the attention logits unchanged if the
queries get its inverse. A basis that gathers the energy in few components lets the others lose RoPE
at a small error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Int

from kvjax.config import GQAConfig, RopeConfig, SelectedPairs

Rotation = Callable[[Complex[np.ndarray, "g g"]], Complex[np.ndarray, "g g"]]
"""E[κᴴκ] of one group of components → a unitary basis, columns by falling energy."""


def complex_rotation(covariance: Complex[np.ndarray, "g g"]) -> Complex[np.ndarray, "g g"]:
    """Eigenvectors of the Hermitian covariance: no unitary basis gathers more energy."""
    return _by_energy(np.linalg.eigh(covariance)[1])


def real_rotation(covariance: Complex[np.ndarray, "g g"]) -> Complex[np.ndarray, "g g"]:
    """Eigenvectors of its real part, Σ (Re κᵀ Re κ + Im κᵀ Im κ): the published RoRoPE."""
    return _by_energy(np.linalg.eigh(np.real(covariance))[1]).astype(np.complex128)


def _by_energy(vectors: np.ndarray) -> np.ndarray:
    """Columns by falling eigenvalue, with a phase that makes the largest entry of each positive."""
    columns = vectors[:, ::-1]
    pivot = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    return columns * (np.abs(pivot) / pivot)


@dataclass(frozen=True)
class KeyStatistics:
    """The statistics of one layer from which a basis is chosen.

    Attributes:
        keys: E[conj(κ_a)·κ_b] [f·K, f·K], components in the order (frequency, KV head).
        queries: E|χ|² [f·K], summed over the query heads of each KV head.
        turning: E_Δ[e^(iΔθ)] [f], Δ distributed as the attention over distances.
        spread: E_Δ|e^(iΔθ) − c|² [f], c the constant that replaces the rotation, times the fourth
            power of RoPE's factor on queries and keys.
        num_heads: K.
    """

    keys: Complex[np.ndarray, "C C"]
    queries: Float[np.ndarray, " C"]
    turning: Complex[np.ndarray, " f"]
    spread: Float[np.ndarray, " f"]
    num_heads: int


@dataclass(frozen=True)
class Basis:
    """A basis of the f·K complex components, and the vectors in it that keep RoPE.

    Attributes:
        vectors: [f·K, f·K], a basis vector a column; κ' = κ · vectors.
        kept: the columns that keep RoPE.
        pairs: the frequency of each of these columns, an index into those of the original RoPE.
    """

    vectors: Complex[np.ndarray, "C C"]
    kept: tuple[int, ...]
    pairs: tuple[int, ...]


Placement = Callable[[KeyStatistics, Rotation, int], Basis]
"""Statistics, rotation and the number of rotating components → a basis."""


def by_energy(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
    """Keeps RoPE on the components that would lose most without it, over all frequencies.

    See `component_losses`. A frequency may be kept several times, or never.
    """
    K = statistics.num_heads
    vectors = _blocks(statistics.keys, rotation, K)
    loss = component_losses(statistics, vectors)
    kept = tuple(sorted(int(c) for c in np.argsort(-loss, kind="stable")[:count]))
    return Basis(vectors, kept, tuple(c // K for c in kept))


def component_losses(
    statistics: KeyStatistics, vectors: Complex[np.ndarray, "C C"]
) -> Float[np.ndarray, " C"]:
    """What each component would lose without RoPE: E|κ|² · E|χ|² · E_Δ|e^(iΔθ) − c|².

    Half of it is the mean square by which it would change the attention logits before their scale,
    summed over the query heads.

    Args:
        vectors: the basis, a component a column, in the order (frequency, KV head).
    """
    energy = np.einsum("ac,ab,bc->c", vectors.conj(), statistics.keys, vectors).real
    queries = np.abs(vectors).T ** 2 @ statistics.queries
    return energy * queries * np.repeat(statistics.spread, statistics.num_heads)


def every(stride: int) -> Placement:
    """Keeps the first component of every `stride`-th frequency, as DeepSeek's layout requires."""

    def place(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
        K = statistics.num_heads
        pairs = tuple(stride * i for i in range(count))
        return Basis(_blocks(statistics.keys, rotation, K), tuple(K * i for i in pairs), pairs)

    return place


def fold(size: int) -> Placement:
    """The published FreqFold, an approximation: `size` neighbouring frequencies share one basis.

    The first size·count/f components of each group keep RoPE. Component m of a group that starts at
    frequency i rotates at frequency i + m·f/count.
    """

    def place(statistics: KeyStatistics, rotation: Rotation, count: int) -> Basis:
        f, K = len(statistics.turning), statistics.num_heads
        if size not in (possible := possible_folds(f, count)):
            folds = ", ".join(map(str, possible))
            expected = f"FreqFold {folds}" if folds else f"rope_dim / 2 to be a divisor of {f}"
            got = f"FreqFold {size} of {f} frequencies cannot keep {count} of them"
            raise ValueError(f"{got}, expected {expected}")
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
    """The FreqFolds that keep `count` components: divisors of f that are multiples of f / count."""
    if count < 1 or frequencies % count:
        return []
    stride = frequencies // count
    return [m for m in range(stride, frequencies + 1, stride) if frequencies % m == 0]


def _blocks(covariance: np.ndarray, rotation: Rotation, size: int) -> np.ndarray:
    """The block-diagonal matrix of the rotations of all groups of `size` components."""
    vectors = np.zeros_like(covariance)
    for start in range(0, len(covariance), size):
        block = slice(start, start + size)
        vectors[block, block] = rotation(covariance[block, block])
    return vectors


@dataclass(frozen=True)
class PartialRope:
    """Maps of keys and queries to a part with RoPE and a part without; fp64.

    q·RoPE·k ≈ q_rope·RoPE·k_rope + q_nope·k_nope, with equality where all components keep RoPE.

    Attributes:
        key_rope, key_nope: [K·H, R] and [K·H, n] from the keys of all heads, R + n = K·H.
        query_rope, query_nope: [N, H, R] and [N, H, n] from the query of each head.
        rope: RoPE of the R components, real parts before imaginary ones; None for R = 0.
    """

    key_rope: Float[np.ndarray, "W R"]
    key_nope: Float[np.ndarray, "W n"]
    query_rope: Float[np.ndarray, "N H R"]
    query_nope: Float[np.ndarray, "N H n"]
    rope: RopeConfig | None

    @property
    def joint(self) -> Float[np.ndarray, "X Y"]:
        """The map [2·K·H, n + K·H] from [k ; v] to [k_nope ; v]."""
        W, n = self.key_nope.shape
        joint = np.zeros((2 * W, n + W))
        joint[:W, :n], joint[W:, n:] = self.key_nope, np.eye(W)
        return joint


def partial_rope(
    base: GQAConfig, basis: Basis, constants: Complex[np.ndarray, " f"]
) -> PartialRope:
    """The real matrices that bring keys and queries into a basis.

    Args:
        base: the attention of the keys and queries.
        constants: c of each frequency, which replaces e^(iΔθ) in components without RoPE.
    """
    N, K, H = base.num_heads, base.num_kv_heads, base.head_dim
    real, imag = component_rows(base)
    # Queries get the inverse of the map of the keys; without RoPE, times the constant as well.
    inverse = np.linalg.inv(basis.vectors).conj().T
    keys = np.zeros((K * H, 2 * len(basis.vectors)))
    keys[real], keys[imag] = _real_map(basis.vectors)
    queries = [np.zeros((K * H, keys.shape[1])) for _ in range(2)]
    factors = (np.ones(len(inverse)), np.repeat(constants, K))
    for wide, factor in zip(queries, factors, strict=True):
        wide[real], wide[imag] = _real_map(factor[:, None] * inverse)
    # A query that reads KV head j has components of that head only.
    rotating, still = (np.repeat(wide.reshape(K, H, -1), N // K, axis=0) for wide in queries)
    # Each complex component is two real columns: its real and its imaginary part.
    kept = np.asarray(basis.kept, np.int64)
    other = np.setdiff1d(np.arange(len(basis.vectors)), kept)
    C = len(basis.vectors)
    kept, other = np.concatenate([kept, C + kept]), np.concatenate([other, C + other])
    # Rows that the original RoPE leaves alone follow unchanged.
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
    """Indices into the K·H numbers of a key: real and imaginary part of each component.

    Components are in the order (frequency, KV head).
    """
    starts = np.arange(base.num_kv_heads)[None] * base.head_dim
    real, imag = rotary_pairs(base.rope)
    return (real[:, None] + starts).reshape(-1), (imag[:, None] + starts).reshape(-1)


def rotary_pairs(rope: RopeConfig | None) -> tuple[np.ndarray, np.ndarray]:
    """[R/2] indices into a head: the real and the imaginary parts of the rotating components."""
    index = np.arange(0 if rope is None else rope.dim)
    if rope is not None and rope.interleaved:
        return index[::2], index[1::2]
    return index[: len(index) // 2], index[len(index) // 2 :]


def _real_map(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z ↦ z · matrix in real numbers: the rows of Re z, and of Im z; columns (real, imaginary)."""
    a, b = np.real(matrix), np.imag(matrix)
    return np.concatenate([a, b], axis=1), np.concatenate([-b, a], axis=1)
