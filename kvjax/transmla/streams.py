"""The calibration text on its way through the layers: a few sequences at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.checks import OVERFLOW, check_finite, check_params, first_not_finite
from kvjax.config import LayerConfig, ModelConfig
from kvjax.feeding import judge
from kvjax.nn import Transformer
from kvjax.nn.transformer import Block, attention_output, block_kind, embed, layer_output
from kvjax.transmla.calibration import LayerStats, check_moments, merge, observe

REPLAY = 8  # sequences that pass through a layer at a time


class Streams(NamedTuple):
    """The residual streams [S, T, D] of the calibration text before a layer.

    Attributes:
        original: in the original model.
        converted: in the model whose earlier layers are converted.
    """

    original: jax.Array
    converted: jax.Array


def check_streams(streams: Mapping[str, jax.Array], index: int, params: Mapping[str, Any]) -> None:
    """Raises ValueError for residual streams before a layer that are not finite."""
    name = first_not_finite(streams)
    if name is not None:
        check_params(params)
        raise ValueError(
            f"layer {index}: its input in the {name} model is NaN or infinite: {OVERFLOW}"
        )


def observe_replay(block: Block, params: dict[str, Any], x: Float[Array, "S T D"]) -> LayerStats:
    """The moments of one layer over all sequences, a few at a time."""
    total, done = None, 0
    for start in range(0, len(x), REPLAY):
        part = x[start : start + REPLAY]
        new, done = observe(block, params, part), done + len(part)
        total = new if total is None else merge(total, new, len(part) / done)
    assert total is not None
    return total


def layer_moments(
    model: Transformer, params: Mapping[str, Any], tokens: Int[np.ndarray, "S T"]
) -> Iterator[tuple[dict[str, Any], LayerStats]]:
    """The attention's parameters and the moments of every layer, one layer in memory at a time."""
    x = embed(model.config, params, tokens)
    for index, layer in enumerate(model.config.layers):
        own = params[f"layers_{index}"]
        check_finite(own, f"layers_{index}/")
        moments = observe_replay(block_kind(model.config, layer).block, own, x)
        check_moments(moments, index, params)
        yield own["attn"], moments
        x = replay(model.config, layer, own, x)


def replay(
    config: ModelConfig, layer: LayerConfig, params: dict[str, Any], x: Float[Array, "S T D"]
) -> Float[Array, "S T D"]:
    """The output of one layer for all sequences, a few at a time."""
    kind = block_kind(config, layer)
    return _a_few_at_a_time(lambda part: layer_output(kind, params, part), x)


def output_target(
    config: ModelConfig,
    layer: LayerConfig,
    params: dict[str, Any],
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> Float[Array, "S T D"]:
    """The output that the converted attention should have.

    It is the output of the original attention plus the error of the converted stream so far, so
    that the layer repairs what earlier layers lost. Where a norm follows the attention, the error
    cannot be added to its output, and the target is the original output alone.

    Args:
        original, converted: the streams before the layer.
    """
    kind = block_kind(config, layer)
    out = _a_few_at_a_time(
        lambda part: attention_output(kind.block, params, kind.pairs, part), original
    )
    return out if config.post_norm else out + original - converted


def error_size(
    config: ModelConfig, original: Float[Array, "S T D"], target: Float[Array, "S T D"]
) -> Float[Array, "S T"]:
    """The size by which the next norm divides the output of the attention, for each token; fp32.

    A few tokens of a trained model have activations a thousand times larger than all others. Their
    errors matter as little as the norm makes them.

    Args:
        original: the stream before the layer.
        target: from `output_target`.
    """
    normed = target if config.post_norm else original + target
    square = jnp.mean(normed.astype(jnp.float32) ** 2, axis=-1)
    # A token that is almost 0 must not outweigh all others.
    return jnp.sqrt(jnp.maximum(square, 1e-4 * jnp.mean(square)) + 1e-30)


def mean_loss(
    model: Transformer,
    params: Mapping[str, Any],
    hidden: Float[Array, "S T D"],
    tokens: Int[np.ndarray, "S T"],
) -> float:
    """The mean loss of all tokens but the first ones; infinity instead of NaN.

    Args:
        hidden: the stream after the last layer.
    """
    losses, _ = judge(model, params, hidden[:, :-1], tokens[:, 1:])
    loss = float(np.asarray(losses, np.float64).mean())
    return loss if np.isfinite(loss) else np.inf  # min() might choose NaN


def _a_few_at_a_time(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    parts = [function(x[i : i + REPLAY]) for i in range(0, len(x), REPLAY)]
    return jnp.concatenate(parts)
