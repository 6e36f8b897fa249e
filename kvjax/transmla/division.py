"""Divides a layer's cache between latent and rotary key, by the errors that its moments predict.

A larger rotary key leaves more components their RoPE, and the latent fewer numbers. Models differ
in what they lose more by: one that copies text needs more rotation than one that tells stories. The
moments of a layer predict the errors of both steps of the closed form, so no text is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.config import GQAConfig
from kvjax.transmla import rotary
from kvjax.transmla.calibration import LayerStats, Stats
from kvjax.transmla.closed_form import (
    VALUES,
    Recipe,
    joint_moments,
    joint_pca,
    key_statistics,
)
from kvjax.transmla.sizes import components

Layers = Iterable[tuple[dict[str, Any], LayerStats]]
"""Parameters of the attention and moments of every layer."""

RecipeOf = Callable[[int], Recipe]
"""rope_dim → the recipe of a conversion with it."""


def attention_layers(params: Mapping[str, Any], stats: Stats) -> Layers:
    """The parameters of every layer's attention, with the layer's moments."""
    return ((params[f"layers_{i}"]["attn"], layer) for i, layer in enumerate(stats.layers))


def mean_errors(
    bases: Sequence[GQAConfig],
    layers: Layers,
    numbers: int,
    rope_dims: Sequence[int],
    recipe_of: RecipeOf,
) -> Float[np.ndarray, " R"]:
    """The error of each rope_dim, the mean over all layers.

    Args:
        bases: the attention of every layer.
        numbers, rope_dims: from `kvjax.transmla.sizes.rope_dims_to_choose`.
    """
    total = np.zeros(len(rope_dims))
    for base, (attn, stats) in zip(bases, layers, strict=True):
        total += division_errors(base, attn, stats, numbers, rope_dims, recipe_of)
    return total / len(bases)


def division_errors(
    base: GQAConfig,
    attn: dict[str, Any],
    stats: LayerStats,
    numbers: int,
    rope_dims: Sequence[int],
    recipe_of: RecipeOf,
) -> Float[np.ndarray, " R"]:
    """The error that the closed form of one layer will have with each rope_dim.

    It is the mean square error of the attention logits, from components that stop rotating and from
    the low rank, plus that of the heads' outputs. Both are divided by the traces of their metrics
    and weighted as in `kvjax.transmla.closed_form.aware`, so errors of layers can be added.

    Args:
        base, attn: the attention of the layer and its parameters.
        numbers: cached numbers of a token; the latent has what a rope_dim leaves.
    """
    _, turning = components(base)
    if not turning:  # whatever rope_dim is, nothing rotates
        return np.zeros(len(rope_dims))
    queries = float(np.einsum("nhh->", stats.q_second))
    found = []
    for width in (min(width, turning) for width in rope_dims):
        recipe = recipe_of(width)
        statistics, constants = key_statistics(base, stats, recipe)
        basis = recipe.placement(statistics, recipe.rotation, width // 2)
        losses = rotary.component_losses(statistics, basis.vectors)
        stopped = (losses.sum() - losses[list(basis.kept)].sum()) / 2
        partial = rotary.partial_rope(base, basis, constants)
        moments = joint_moments(base, attn, stats, partial, recipe)
        low = joint_pca(moments, recipe.metric, numbers - width)
        rest = np.eye(len(moments.mean)) - low.down @ low.up
        lost, n = rest.T @ moments.covariance @ rest, len(moments.key_metric)
        keys = np.vdot(moments.key_metric, lost[:n, :n])
        values = np.vdot(moments.value_metric, lost[n:, n:]) / np.trace(moments.value_metric)
        found.append((stopped + keys) / max(queries, 1e-30) + VALUES * values)
    return np.nan_to_num(np.asarray(found), nan=np.inf)
