"""The closed form of a decoupled layer, from its second moments and a recipe.

A `Recipe` names the function of each step: a published one (arXiv 2502.07864v5), or a better one.
`close` runs the steps: partial RoPE; then the joint PCA, which gives one latent for the values and
for the key components without RoPE; then both as one `LatentLayer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from kvjax.checks import SIZE, check_ranges, rounded
from kvjax.config import GQAConfig, MLAConfig
from kvjax.nn.layers import frequencies
from kvjax.transmla import rotary
from kvjax.transmla.calibration import LayerStats
from kvjax.transmla.layer import LatentLayer
from kvjax.transmla.roots import Root

# --- The choices of a recipe ---------------------------------------------------------------------

Constants = Callable[[Complex[np.ndarray, " f"]], Complex[np.ndarray, " f"]]
"""E_Δ[e^(iΔθ)] of each frequency → the constant that replaces e^(iΔθ) where nothing rotates."""


def expected(turning: Complex[np.ndarray, " f"]) -> Complex[np.ndarray, " f"]:
    """c = E_Δ[e^(iΔθ)], the least-squares constant: fast components shrink towards 0."""
    return turning


def one(turning: Complex[np.ndarray, " f"]) -> Complex[np.ndarray, " f"]:
    """c = 1, as if query and key were at the same position: the published method."""
    return np.ones_like(turning)


Weighting = Callable[[LayerStats], tuple[Float[np.ndarray, " X"], Float[np.ndarray, "X X"]]]
"""Statistics of a layer → mean and second moments of x = [k ; v] for the joint PCA."""


def attended(stats: LayerStats) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, "X X"]]:
    """Each token counts as much as the attention that it receives.

    An error in a token changes the output in proportion to its attention. In trained models a first
    token that differs from all others often receives most of it.
    """
    return stats.attended_mean, stats.attended_second


def even(stats: LayerStats) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, "X X"]]:
    """All tokens count alike: the published method."""
    return stats.kv_mean, stats.kv_second


@dataclass(frozen=True)
class JointMoments:
    """Statistics of x = [k_nope ; v] of one layer, W = n + K·H numbers; fp64.

    Attributes:
        covariance: E[xᵀx] [W, W], centred in the components that `mean` has.
        mean: [W], zeros for components that are not centred.
        key_metric: [n, n] Σ over heads of E[q_nopeᵀ q_nope]: how an error in k_nope changes the
            logits.
        value_metric: [K·H, K·H] Σ over heads of W_O W_Oᵀ: how an error in v changes the output.
    """

    covariance: Float[np.ndarray, "W W"]
    mean: Float[np.ndarray, " W"]
    key_metric: Float[np.ndarray, "n n"]
    value_metric: Float[np.ndarray, "V V"]


Metric = Callable[[JointMoments], Float[np.ndarray, "W W"]]
"""Moments → a root R of the metric M = R Rᵀ in which the PCA measures errors: it takes e to e·R."""


VALUES = 2.0
"""Weight of the values' errors beside those of the keys. It was chosen on SmolLM2 and stories260k
and checked on Qwen2.5-Coder, see docs/decoupled.md."""


def aware(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Measures errors of keys by the attention logits, and errors of values by the output.

    Attention logits and outputs have different units, so each metric is divided by its trace.
    """
    return _diagonal(_root(moments.key_metric), VALUES**0.5 * _root(moments.value_metric))


def balanced(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Balanced KV, the published rule: divides keys by the ratio of the mean column norms."""
    n = len(moments.key_metric)
    norms = np.sqrt(np.maximum(np.diag(moments.covariance), 0.0))  # rounding: a little below 0
    keys, values = norms[:n].mean() if n else 0.0, norms[n:].mean()
    ratio = keys / values if keys > 0 and values > 0 else 1.0  # dead heads leave both as they are
    return np.diag(np.concatenate([np.full(n, 1 / ratio), np.ones(len(norms) - n)]))


def plain(moments: JointMoments) -> Float[np.ndarray, "W W"]:
    """Gives all components of keys and values the same weight."""
    return np.eye(len(moments.covariance))


@dataclass(frozen=True)
class Recipe:
    """The closed form of a layer's conversion, and what is fitted afterwards.

    Attributes:
        rotation: chooses the unitary basis of one frequency's components.
        placement: chooses the components that keep RoPE.
        constants: chooses the constant that replaces e^(iΔθ) in the other components.
        weighting: how much each token counts in the joint PCA.
        metric: the metric in which the joint PCA measures errors.
        centred: subtract the means of k_nope and v before the PCA. This is exact: a constant in
            k_nope shifts all attention logits of a query alike, and a constant in v becomes a bias
            of the output. Means of keys are kept where these logits are soft-capped.
        refit: fit attention logits and outputs to those of the original layer by least squares,
            layer after layer (kvjax.transmla.refit_queries, refit_outputs).
        biased: fit a bias of the output too.
        recalibrate: measure the moments of the joint PCA in the model with partial RoPE, as the
            published code does.
    """

    rotation: rotary.Rotation = rotary.complex_rotation
    placement: rotary.Placement = rotary.by_energy
    constants: Constants = expected
    weighting: Weighting = attended
    metric: Metric = aware
    centred: bool = True
    refit: bool = True
    biased: bool = True
    recalibrate: bool = False


BEST = Recipe()
"""The recipe that measured best in docs/decoupled.md. The next ones are within 0.1 % on stories260k
and within one standard error on the embedded model."""

UNBIASED = Recipe(centred=False, biased=False)
"""The best recipe that adds no bias to a model without biases, as exports with norm="rms" need."""


def published(fold: int) -> Recipe:
    """The method of TransMLA v3 to v5 (arXiv 2502.07864) with FreqFold `fold`.

    Examples:
        >>> recipe = kvjax.transmla.published(fold=2)
        >>> options = {"calibration": ids, "kv_rank": 12, "rope_dim": 4, "recipe": recipe}
        >>> new_model, weights = kvjax.transmla.convert(model, params, "decoupled", **options)

    Raises:
        ValueError: a `fold` that is not a number from 0.
    """
    check_ranges({"fold": fold}, {"fold": SIZE})
    return Recipe(
        rotary.real_rotation,
        rotary.fold(fold),
        one,
        even,
        balanced,
        centred=False,
        refit=False,
        recalibrate=True,
    )


# --- The steps ------------------------------------------------------------------------------------


def close(
    base: GQAConfig,
    attn: dict[str, Any],
    stats: LayerStats,
    rank: int | None,
    rope_dim: int,
    recipe: Recipe,
    seen: LayerStats | None = None,
) -> LatentLayer:
    """Converts the attention of one layer in closed form.

    Args:
        base, attn: the attention of the layer and its parameters.
        stats: moments of the layer in the original model.
        rank: latent width; None for the full width, which leaves RoPE as the only approximation.
        rope_dim: width R of the rotary key.
        seen: other moments for the joint PCA (see `Recipe.recalibrate`); None: `stats`.
    """
    partial = fit_partial_rope(base, stats, rope_dim, recipe)
    observed = stats if seen is None else seen
    moments = joint_moments(base, attn, observed, partial, recipe)
    low = whole(len(moments.mean)) if rank is None else joint_pca(moments, recipe.metric, rank)
    out = np.asarray(attn["o"]).astype(np.float64)
    bias = np.asarray(attn["o_bias"]).astype(np.float64) if base.out_bias else 0.0
    return assemble(partial, low, out, bias + np.zeros(out.shape[-1]))


def fit_partial_rope(
    base: GQAConfig, stats: LayerStats, rope_dim: int, recipe: Recipe
) -> rotary.PartialRope:
    """Chooses the components that keep RoPE, and the constants of the others.

    Args:
        rope_dim: width R of the rotary key; R / 2 complex components keep RoPE.
    """
    statistics, constants = key_statistics(base, stats, recipe)
    basis = recipe.placement(statistics, recipe.rotation, rope_dim // 2)
    return rotary.partial_rope(base, basis, constants)


def key_statistics(
    base: GQAConfig, stats: LayerStats, recipe: Recipe
) -> tuple[rotary.KeyStatistics, Complex[np.ndarray, " f"]]:
    """From which a basis of the keys is chosen, and the constant of each frequency."""
    inverse, factor = _frequencies(base, len(stats.distance))
    # How far each frequency turns over the distances that the layer attends to.
    angles = np.arange(len(stats.distance))[:, None] * inverse[None]
    turning = stats.distance @ np.exp(1j * angles)
    constants = recipe.constants(turning)
    spread = factor**4 * (stats.distance @ np.abs(np.exp(1j * angles) - constants) ** 2)
    # The energies of keys and queries in every complex component.
    real, imag = rotary.component_rows(base)
    width = base.num_kv_heads * base.head_dim
    second = stats.kv_second[:width, :width]
    keys = _hermitian(second, real, imag)
    G = base.num_heads // base.num_kv_heads
    energy = np.einsum("nhh->nh", stats.q_second).reshape(-1, G, base.head_dim).sum(1).reshape(-1)
    statistics = rotary.KeyStatistics(
        keys, energy[real] + energy[imag], turning, spread, base.num_kv_heads
    )
    return statistics, constants * factor**2


def _frequencies(base: GQAConfig, length: int) -> tuple[Float[np.ndarray, " f"], float]:
    """Radians a token of every rotary pair, and RoPE's factor on queries and keys."""
    if base.rope is None:
        return np.zeros(0), 1.0
    inverse, factor = frequencies(base.rope, jnp.full((1,), length, jnp.int32))
    return np.asarray(inverse[0], np.float64), factor


def _hermitian(second: np.ndarray, real: np.ndarray, imag: np.ndarray) -> np.ndarray:
    """E[conj(κ_a)·κ_b] from the second moments of real and imaginary parts."""
    rr, ii = second[np.ix_(real, real)], second[np.ix_(imag, imag)]
    ri = second[np.ix_(real, imag)]
    return rr + ii + 1j * (ri - ri.T)


# --- Joint PCA: x = [k_nope ; v] is cached as c = x · down, and read back as c · up + constant ----


def joint_moments(
    base: GQAConfig,
    attn: dict[str, Any],
    stats: LayerStats,
    partial: rotary.PartialRope,
    recipe: Recipe,
) -> JointMoments:
    """The moments of [k_nope ; v], and the metrics of keys and values.

    Args:
        base, attn: the attention of the layer and its parameters.
        recipe: `weighting`, and whether means are subtracted; those of keys are subtracted only
            where attention logits have no soft-cap.
    """
    K, H, joint = base.num_kv_heads, base.head_dim, partial.joint
    W = K * H
    average, second = recipe.weighting(stats)
    mean = average.copy() if recipe.centred else np.zeros_like(average)
    if base.softcap is not None:  # a shift of all attention logits would change the output
        mean[:W] = 0.0
    # E[(x − m)ᵀ(x − m)], where the means m may be of some components only.
    covariance = second - np.outer(mean, average) - np.outer(average, mean)
    covariance += np.outer(mean, mean)
    queries = partial.query_nope
    key_metric = np.einsum("nhw,nhg,ngx->wx", queries, stats.q_second, queries, optimize=True)
    out = np.asarray(attn["o"]).astype(np.float64).reshape(K, -1, H, attn["o"].shape[-1])
    value_metric = np.zeros((K, H, K, H))
    for head in range(K):
        value_metric[head, :, head] = np.tensordot(out[head], out[head], ((0, 2), (0, 2)))
    covariance = joint.T @ covariance @ joint
    return JointMoments(covariance, mean @ joint, key_metric, value_metric.reshape(W, W))


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

    With the root R of the metric and the leading eigenvectors U of Rᵀ C R, of eigenvalues Λ:
    down = R U Λ^-½, up = Λ^½ Uᵀ R⁻¹, and the constant is the part of the mean that the two lose.
    So all latents have the same size: fits in fp32 and 8-bit caches lose none of them.
    """
    root = metric(moments)
    values, vectors = np.linalg.eigh(root.T @ moments.covariance @ root)
    order = np.argsort(-values, kind="stable")[:rank]
    leading, values = vectors[:, order], values[order]
    # Eigenvectors have no sign: fix one, so that platforms agree.
    pivot = np.take_along_axis(leading, np.abs(leading).argmax(axis=0)[None], axis=0)
    leading = leading * np.sign(pivot)
    # A text that never takes a direction leaves its eigenvalue at 0.
    whole = values.max(initial=0.0) + np.sum((moments.mean @ root) ** 2)
    size = np.sqrt(np.maximum(values, 1e-8 * whole + 1e-30))
    down, up = root @ leading / size, size[:, None] * np.linalg.solve(root.T, leading).T
    return LowRank(down, up, moments.mean - moments.mean @ down @ up)


def _root(metric: np.ndarray) -> np.ndarray:
    """A root of a metric scaled to trace 1, as `Metric` says; it can be inverted."""
    n, trace = len(metric), np.trace(metric)
    if trace <= 0:
        return np.eye(n) / np.sqrt(max(n, 1))
    return Root.of(metric / trace, floor=1e-9).root.T


def _diagonal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.zeros((len(a) + len(b),) * 2)
    out[: len(a), : len(a)], out[len(a) :, len(a) :] = a, b
    return out


# --- The parts as one layer -----------------------------------------------------------------------


def assemble(
    partial: rotary.PartialRope,
    low: LowRank,
    out: Float[np.ndarray, "N H D"],
    out_bias: Float[np.ndarray, " D"],
) -> LatentLayer:
    """One layer from its partial RoPE and its joint PCA; `out` and `out_bias` are those of GQA."""
    N, H, _ = out.shape
    W, n = partial.key_nope.shape
    K = W // H
    key_up, value_up = low.up[:, :n], low.up[:, n:].reshape(-1, K, H)
    # The weights of the attention add up to 1, so a constant value becomes a bias of the output.
    # The constant of the keys drops out of the softmax.
    constant = low.constant[n:].reshape(K, H)
    return LatentLayer(
        down=partial.joint @ low.down,
        key_rope=np.concatenate([partial.key_rope, np.zeros_like(partial.key_rope)]),
        query_rope=partial.query_rope,
        k_up=np.einsum("lw,nhw->lnh", key_up, partial.query_nope, optimize=True),
        v_up=np.repeat(value_up, N // K, axis=1),
        out=out,
        out_bias=out_bias + np.einsum("nh,nhd->d", np.repeat(constant, N // K, axis=0), out),
        rope=partial.rope,
    )


def low_rank_query(
    config: MLAConfig,
    attn: Mapping[str, Any],
    rank: int,
    input_second: Float[np.ndarray, "D D"],
) -> tuple[MLAConfig, dict[str, Any]]:
    """Cuts the query projection of folded attention to a rank, by PCA of the queries.

    Args:
        config, attn: from `folded`.
        input_second: E[yᵀy] of the input of the attention.
    """
    wide = np.asarray(attn["q"]).astype(np.float64).reshape(len(input_second), -1)
    root = Root.of(input_second, floor=1e-9)
    # With a white input, the error of a query is that of its projection: a plain PCA.
    outputs = root.root @ wide
    leading = np.linalg.eigh(outputs @ outputs.T)[1][:, ::-1][:, :rank]
    q = (leading.T @ outputs).reshape(rank, *attn["q"].shape[1:])
    dtype = attn["q"].dtype
    new = {"q_a": rounded(root.inverse @ leading, dtype), "q": rounded(q, dtype)}
    if config.latent_bias:  # q_a and kv_a have a bias both or none; that of the queries stays in q
        new["q_a_bias"] = jnp.zeros((rank,), dtype)
    return dataclasses.replace(config, q_lora_rank=rank), {**attn, **new}
