"""One latent for what does not rotate of the keys, and the values: joint PCA (2502.07864v5, 4.2).

x = [k_nope ; v] is cached as c = x · down, and read back as c · up + a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class JointMoments:
    """Statistics of x = [k_nope ; v] of one layer, W = n + K·H numbers; fp64.

    Attributes:
        covariance: E[xᵀx] [W, W], centred where a constant in x costs nothing.
        mean: [W], zeros where it is not centred.
        key_metric: [n, n] Σ over heads of E[q_nopeᵀ q_nope]: what an error in k_nope does to the
            scores.
        value_metric: [K·H, K·H] Σ over heads of W_O W_Oᵀ: what an error in v does to the
            output.
    """

    covariance: Float[np.ndarray, "W W"]
    mean: Float[np.ndarray, " W"]
    key_metric: Float[np.ndarray, "n n"]
    value_metric: Float[np.ndarray, "V V"]


Metric = Callable[[JointMoments], Float[np.ndarray, "W W"]]
"""Moments → the symmetric square root of the metric in which the PCA measures errors."""


def aware(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Errors of keys as the queries see them, of values as the output projection does.

    The two are in different units; each is divided by its trace.
    """
    parts = (_normalized(moments.key_metric), _normalized(moments.value_metric))
    return _diagonal(*(_power(part, 0.5) for part in parts))


def balanced(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Balanced KV, the published rule: keys divided by the ratio of the mean column norms."""
    n = len(moments.key_metric)
    norms = np.sqrt(np.diag(moments.covariance))
    keys, values = norms[:n].mean() if n else 0.0, norms[n:].mean()
    ratio = keys / values if keys > 0 and values > 0 else 1.0  # dead heads leave both as they are
    return np.diag(np.concatenate([np.full(n, 1 / ratio), np.ones(len(norms) - n)]))


def plain(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Keys and values as they are."""
    return np.eye(len(moments.covariance))


@dataclass(frozen=True)
class LowRank:
    """x ≈ x · down · up + constant.

    Attributes:
        down, up: [W, L] and [L, W].
        constant: [W].
    """

    down: Float[np.ndarray, "W L"]
    up: Float[np.ndarray, "L W"]
    constant: Float[np.ndarray, " W"]


def whole(width: int) -> LowRank:
    """x as it is: all of the rank, nothing to decompose."""
    return LowRank(np.eye(width), np.eye(width), np.zeros(width))


def joint_pca(moments: JointMoments, metric: Metric, rank: int) -> LowRank:
    """The projection on `rank` components with the least expected error in the metric.

    With the root M^½ of the metric and the leading eigenvectors U of M^½ C M^½:
    down = M^½ U, up = Uᵀ M^-½, and the constant is the part of the mean that they lose.
    """
    root = metric(moments)
    values, vectors = np.linalg.eigh(root @ moments.covariance @ root)
    leading = vectors[:, np.argsort(-values, kind="stable")[:rank]]
    pivot = np.take_along_axis(leading, np.abs(leading).argmax(axis=0)[None], axis=0)
    leading = leading * np.sign(pivot)
    down, up = root @ leading, leading.T @ _power(root, -1.0)
    return LowRank(down, up, moments.mean - moments.mean @ down @ up)


def _normalized(metric: np.ndarray) -> np.ndarray:
    """Trace 1, and no direction that costs nothing: the root must have an inverse."""
    if not len(metric):
        return metric
    trace = np.trace(metric)
    if trace <= 0:
        return np.eye(len(metric)) / len(metric)
    return metric / trace + 1e-9 / len(metric) * np.eye(len(metric))


def _diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a) + len(b),) * 2)
    out[: len(a), : len(a)], out[len(a) :, len(a) :] = a, b
    return out


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a positive symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-300) ** exponent) @ vectors.T
