"""One latent for the values and for the key components without RoPE: joint PCA.

x = [k_nope ; v] is cached as c = x · down, and read back as c · up + constant (arXiv 2502.07864v5,
section 4.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.checks import rounded
from kvjax.config import GQAConfig, MLAConfig
from kvjax.transmla.calibration import LayerStats
from kvjax.transmla.rotary import PartialRope


@dataclass(frozen=True)
class JointMoments:
    """Statistics of x = [k_nope ; v] of one layer, W = n + K·H numbers; fp64.

    Attributes:
        covariance: E[xᵀx] [W, W], centred in the components that `mean` has.
        mean: [W], zeros for components that are not centred.
        key_metric: [n, n] Σ over heads of E[q_nopeᵀ q_nope]: how an error in k_nope changes the
            scores.
        value_metric: [K·H, K·H] Σ over heads of W_O W_Oᵀ: how an error in v changes the output.
    """

    covariance: Float[np.ndarray, "W W"]
    mean: Float[np.ndarray, " W"]
    key_metric: Float[np.ndarray, "n n"]
    value_metric: Float[np.ndarray, "V V"]


def joint_moments(
    base: GQAConfig,
    attn: dict[str, Any],
    stats: LayerStats,
    partial: PartialRope,
    centred: bool,
) -> JointMoments:
    """The moments of [k_nope ; v], and the metrics of keys and values.

    Args:
        base, attn: the attention of the layer and its parameters.
        centred: subtract the means; those of keys only where scores have no soft-cap.
    """
    K, H, joint = base.num_kv_heads, base.head_dim, partial.joint
    W = K * H
    mean = stats.kv_mean.copy() if centred else np.zeros_like(stats.kv_mean)
    if base.softcap is not None:  # a shift of all scores would change the output
        mean[:W] = 0.0
    # E[(x − m)ᵀ(x − m)], where the means m may be of some components only.
    covariance = stats.kv_second - np.outer(mean, stats.kv_mean) - np.outer(stats.kv_mean, mean)
    covariance += np.outer(mean, mean)
    queries = partial.query_nope
    key_metric = np.einsum("nhw,nhg,ngx->wx", queries, stats.q_second, queries, optimize=True)
    out = np.asarray(attn["o"]).astype(np.float64).reshape(K, -1, H, attn["o"].shape[-1])
    value_metric = np.zeros((K, H, K, H))
    for head in range(K):
        value_metric[head, :, head] = np.tensordot(out[head], out[head], ((0, 2), (0, 2)))
    covariance = joint.T @ covariance @ joint
    return JointMoments(covariance, mean @ joint, key_metric, value_metric.reshape(W, W))


Metric = Callable[[JointMoments], Float[np.ndarray, "W W"]]
"""Moments → the symmetric square root of the metric in which the PCA measures errors."""


def aware(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Measures errors of keys by the scores, and errors of values by the output.

    Scores and outputs have different units, so each metric is divided by its trace.
    """
    return _diagonal(_root(moments.key_metric), _root(moments.value_metric))


def balanced(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Balanced KV, the published rule: divides keys by the ratio of the mean column norms."""
    n = len(moments.key_metric)
    norms = np.sqrt(np.diag(moments.covariance))
    keys, values = norms[:n].mean() if n else 0.0, norms[n:].mean()
    ratio = keys / values if keys > 0 and values > 0 else 1.0  # dead heads leave both as they are
    return np.diag(np.concatenate([np.full(n, 1 / ratio), np.ones(len(norms) - n)]))


def plain(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Weighs all components of keys and values alike."""
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
    """The identity: a latent of the full width W."""
    return LowRank(np.eye(width), np.eye(width), np.zeros(width))


def joint_pca(moments: JointMoments, metric: Metric, rank: int) -> LowRank:
    """The projection on `rank` components with the least expected error in the metric.

    With the root M^½ of the metric and the leading eigenvectors U of M^½ C M^½:
    down = M^½ U, up = Uᵀ M^-½, and the constant is the part of the mean that the two lose.
    """
    root = metric(moments)
    values, vectors = np.linalg.eigh(root @ moments.covariance @ root)
    leading = vectors[:, np.argsort(-values, kind="stable")[:rank]]
    # Eigenvectors have no sign: fix one, so that platforms agree.
    pivot = np.take_along_axis(leading, np.abs(leading).argmax(axis=0)[None], axis=0)
    leading = leading * np.sign(pivot)
    down, up = root @ leading, leading.T @ _inverse(root)
    return LowRank(down, up, moments.mean - moments.mean @ down @ up)


def low_rank_query(
    config: MLAConfig,
    attn: Mapping[str, Any],
    rank: int,
    input_second: Float[np.ndarray, "D D"],
) -> tuple[MLAConfig, dict[str, Any]]:
    """Cuts the query projection of folded attention to a rank, by PCA of the queries.

    Args:
        config, attn: from `latent_layer.folded`.
        input_second: E[yᵀy] of the input of the attention.
    """
    wide = np.asarray(attn["q"]).astype(np.float64).reshape(len(input_second), -1)
    values, vectors = np.linalg.eigh(input_second)
    scale = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
    # With a white input, the error of a query is that of its projection: a plain PCA.
    outputs = root @ wide
    leading = np.linalg.eigh(outputs @ outputs.T)[1][:, ::-1][:, :rank]
    q = (leading.T @ outputs).reshape(rank, *attn["q"].shape[1:])
    dtype = attn["q"].dtype
    new = {"q_a": rounded(inverse @ leading, dtype), "q": rounded(q, dtype)}
    if config.latent_bias:  # q_a and kv_a have a bias both or none; that of the queries stays in q
        new["q_a_bias"] = jnp.zeros((rank,), dtype)
    return dataclasses.replace(config, q_lora_rank=rank), {**attn, **new}


def _root(metric: np.ndarray) -> np.ndarray:
    """The symmetric root of a metric scaled to trace 1, with eigenvalues lifted above 0."""
    n, trace = len(metric), np.trace(metric)
    if trace <= 0:
        return np.eye(n) / np.sqrt(max(n, 1))
    values, vectors = np.linalg.eigh(metric / trace)
    # Rounding leaves some eigenvalues below 0. The root is inverted, so none may be 0 either.
    return (vectors * np.sqrt(np.maximum(values, 0.0) + 1e-9 / n)) @ vectors.T


def _diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a) + len(b),) * 2)
    out[: len(a), : len(a)], out[len(a) :, len(a) :] = a, b
    return out


def _inverse(root: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(root)
    return (vectors / np.maximum(values, 1e-300)) @ vectors.T
