"""The closed form of a decoupled layer, from its second moments and a recipe.

A `Recipe` names the function of each step: a published one (arXiv 2502.07864v5), or a better one.
`close` runs the steps: partial RoPE, then the joint PCA, then both as one `LatentLayer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from kvjax.checks import SIZE, check_ranges
from kvjax.config import GQAConfig
from kvjax.nn.rope import frequencies
from kvjax.transmla import low_rank, rotary
from kvjax.transmla.calibration import LayerStats
from kvjax.transmla.latent_layer import LatentLayer

Constants = Callable[[Complex[np.ndarray, " f"]], Complex[np.ndarray, " f"]]
"""E_Δ[e^(iΔθ)] of each frequency → the constant that replaces e^(iΔθ) where nothing rotates."""


def expected(turning: Complex[np.ndarray, " f"]) -> Complex[np.ndarray, " f"]:
    """c = E_Δ[e^(iΔθ)], the least-squares constant: fast components shrink towards 0."""
    return turning


def one(turning: Complex[np.ndarray, " f"]) -> Complex[np.ndarray, " f"]:
    """c = 1, as if query and key were at the same position: the published method."""
    return np.ones_like(turning)


@dataclass(frozen=True)
class Recipe:
    """The closed form of a layer's conversion, and what is fitted afterwards.

    Attributes:
        rotation: chooses the unitary basis of one frequency's components.
        placement: chooses the components that keep RoPE.
        constants: chooses the constant that replaces e^(iΔθ) in the other components.
        metric: the metric in which the joint PCA measures errors.
        centred: subtract the means of k_nope and v before the PCA. This is exact: a constant in
            k_nope shifts all scores of a query alike, and a constant in v becomes a bias of the
            output. Means of keys are kept where scores are soft-capped.
        refit: fit scores and outputs to those of the original layer by least squares, layer after
            layer (kvjax.transmla.refit_scores, refit_outputs).
        biased: fit a bias of the output too.
        recalibrate: measure the moments of the joint PCA in the model with partial RoPE, as the
            published code does.
    """

    rotation: rotary.Rotation = rotary.complex_rotation
    placement: rotary.Placement = rotary.by_energy
    constants: Constants = expected
    metric: low_rank.Metric = low_rank.aware
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

    Raises:
        ValueError: a `fold` that is not a number from 0.
    """
    check_ranges({"fold": fold}, {"fold": SIZE})
    return Recipe(
        rotary.real_rotation,
        rotary.fold(fold),
        one,
        low_rank.balanced,
        centred=False,
        refit=False,
        recalibrate=True,
    )


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
    moments = low_rank.joint_moments(base, attn, observed, partial, recipe.centred)
    if rank is None:
        low = low_rank.whole(len(moments.mean))
    else:
        low = low_rank.joint_pca(moments, recipe.metric, rank)
    out = np.asarray(attn["o"]).astype(np.float64)
    bias = np.asarray(attn["o_bias"]).astype(np.float64) if base.out_bias else 0.0
    return assemble(partial, low, out, bias + np.zeros(out.shape[-1]))


def assemble(
    partial: rotary.PartialRope,
    low: low_rank.LowRank,
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


def fit_partial_rope(
    base: GQAConfig, stats: LayerStats, rope_dim: int, recipe: Recipe
) -> rotary.PartialRope:
    """Chooses the components that keep RoPE, and the constants of the others.

    Args:
        rope_dim: width R of the rotary key; R / 2 complex components keep RoPE.
    """
    inverse, factor = _frequencies(base, len(stats.distance))
    # How far each frequency turns over the distances that the layer attends to.
    angles = np.arange(len(stats.distance))[:, None] * inverse[None]
    turning = stats.distance @ np.exp(1j * angles)
    constants = recipe.constants(turning)
    spread = stats.distance @ np.abs(np.exp(1j * angles) - constants) ** 2
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
    basis = recipe.placement(statistics, recipe.rotation, rope_dim // 2)
    return rotary.partial_rope(base, basis, constants * factor**2)


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
