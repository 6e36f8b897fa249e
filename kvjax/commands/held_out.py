"""The held-out text of a decoupled conversion: its streams through the layers, and their losses.

Its residual streams run through the original model, through every stage of the conversion, and
through models with some first layers fitted. The last ones decide how many layers keep their fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kvjax.checks import OVERFLOW
from kvjax.config import LayerConfig, ModelConfig
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kind, layer_output
from kvjax.transmla.decoupled import ConvertedLayer
from kvjax.transmla.depth import best_depth, depths
from kvjax.transmla.streams import mean_loss

STAGES = ("partial_rope", "low_rank", "final")
"""The steps of a decoupled layer, in order; see `ConvertedLayer`."""
HELD_OUT = tuple(f"held_{step}" for step in ("original", *STAGES))
"""The residual streams of the held-out text: of the original model, and after each stage."""
DEPTH = "held_depth_"
"""Begins the names of held-out streams with some first layers fitted, and the others not."""


def stream_names(layers: int, refit: bool) -> list[str]:
    """The names of all streams of the held-out text.

    Args:
        refit: whether the recipe fits layers.
    """
    partly = depths(layers)[1:-1] if refit else []
    return [*HELD_OUT, *(DEPTH + str(depth) for depth in partly)]


def advance(
    config: ModelConfig, converted: ConvertedLayer, steps: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Runs the held-out text through one layer of the original model, every stage and depth."""
    layer, own = config.layers[converted.index], converted.source
    forms = {"original": (layer, own)}
    for stage in STAGES:
        attention, attn = converted.attention(getattr(converted, stage))
        forms[stage] = LayerConfig(attention, layer.mlp), {**own, "attn": attn}

    def form(name: str) -> tuple[LayerConfig, dict[str, Any]]:
        if name.startswith(DEPTH):
            fitted = converted.index < int(name.removeprefix(DEPTH))
            return forms["final" if fitted else "low_rank"]
        return forms[name.removeprefix("held_")]

    new = {}
    for name, x in steps.items():
        changed, params = form(name)
        new[name] = layer_output(block_kind(config, changed), params, x)
    return new


def fitted_layers(
    model: Transformer, top: dict[str, Any], streams: Mapping[str, jax.Array], held: np.ndarray
) -> int:
    """The number of first layers that keep their fits, see `kvjax.transmla.depth`.

    Args:
        top: the parameters that make logits.
        streams: after the last layer, of a recipe that refits.
        held: int32 [H, T] the held-out text.
    """
    names = _depth_names(model.config.num_layers)
    return best_depth({d: mean_loss(model, top, streams[n], held) for d, n in names.items()})


def _depth_names(layers: int) -> dict[int, str]:
    """The held-out stream of every depth."""
    ends = {0: "held_low_rank", layers: "held_final"}
    return {depth: ends.get(depth, DEPTH + str(depth)) for depth in depths(layers)}


def perplexities(
    model: Transformer,
    top: dict[str, Any],
    streams: Mapping[str, jax.Array],
    fitted: int,
    held: np.ndarray,
) -> dict[str, float]:
    """perplexity_<step> of the held-out text: the original model, and every stage.

    Args:
        fitted: the number of layers that keep their fits in the final model.
    """
    names = ("original", *STAGES)
    chosen = dict(zip(names, HELD_OUT, strict=True))
    chosen["final"] = _depth_names(model.config.num_layers)[fitted]
    means = {n: np.exp(mean_loss(model, top, streams[chosen[n]], held)) for n in names}
    for name, mean in means.items():
        if not np.isfinite(mean):
            raise ValueError(f"perplexity_{name} is {mean}, expected a number: {OVERFLOW}")
    return {f"perplexity_{name}": round(float(mean), 4) for name, mean in means.items()}
