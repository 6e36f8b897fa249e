"""GQA → multi-head latent attention with a smaller cache (TransMLA v3 to v5, arXiv 2502.07864)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import AttentionConfig, GQAConfig, LayerConfig, MLAConfig, ModelConfig
from kvjax.finite import OVERFLOW, check_finite, check_params, first_not_finite
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn.transformer import (
    Block,
    Transformer,
    attention_output,
    block_kind,
    embed,
    layer_output,
)
from kvjax.transmla.calibration import LayerStats, Stats, check_moments, merge, observe
from kvjax.transmla.closed_form import BEST, Recipe, close
from kvjax.transmla.latent_layer import LatentLayer, folded, over_heads
from kvjax.transmla.layer import gqa_layers, with_attention
from kvjax.transmla.low_rank import low_rank_query
from kvjax.transmla.refit_outputs import refit_outputs
from kvjax.transmla.refit_scores import refit_scores
from kvjax.transmla.sizes import (
    Sizes,
    check_query_rank,
    checked_stats,
    exportable_recipe,
    layer_sizes,
)

REPLAY = 8  # sequences that are calibrated on, or go through a layer, at a time
LAYOUTS = {"fold": folded, "post": over_heads}
"""mode → layout of the converted layer."""


class Streams(NamedTuple):
    """The calibration text in front of a layer: residual streams [S, T, D].

    Attributes:
        original: in the original model.
        converted: behind the layers that are converted already.
    """

    original: jax.Array
    converted: jax.Array


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer after each step of its conversion.

    Attributes:
        index: which layer.
        source: its parameters before.
        streams: behind it; they are moved on where the recipe or the moments need them.
        partial_rope: RoPE on fewer components, all of the rank.
        low_rank: the latent cut to its rank.
        final: after the least squares.
        layout: config and parameters of a step, in the dtype of the source.
    """

    index: int
    source: dict[str, Any]
    streams: Streams
    partial_rope: LatentLayer
    low_rank: LatentLayer
    final: LatentLayer
    layout: Callable[[LatentLayer], tuple[AttentionConfig, dict[str, Any]]]


@automatic_axes()
def to_decoupled(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    *,
    kv_rank: int | Sequence[int] = 448,
    rope_dim: int | Sequence[int] = 128,
    v_head_dim: int | None = None,
    q_rank: int | None = None,
    exportable: bool = False,
    mode: str = "auto",
    recipe: Recipe = BEST,
    progress: Callable[[ConvertedLayer], None] | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """Converts every GQA layer to latent attention that caches kv_rank + rope_dim numbers a token.

    Nothing is trained: the conversion is closed-form algebra on second moments, and least squares
    on the calibration text. docs/decoupled.md has the method and its measurements.

    Args:
        stats: from `calibrate`, on text like that which the model shall read.
        kv_rank, rope_dim: widths of the latent and of the rotary key, one for all layers or one a
            layer. rope_dim counts where a layer has RoPE; layers without it have none.
        v_head_dim: width of a head's output before the output projection; None: H. Up to the rank
            a larger one is a better fit, at the cost of larger v_up and o. Needs a recipe that
            refits.
        q_rank: rank of the query projection (PCA of the queries); None: full. Needs folded layers
            and `calibrate(…, input_moments=True)`. It saves weights, no cache.
        exportable: keep to what the DeepSeek-V3 layout can express: one rotating component for
            each of rope_dim / 2 evenly spaced frequencies, in folded form.
        mode: "fold" multiplies the maps into the projections (MLA proper), "post" keeps the
            projections and norms of GQA before them; "auto" folds unless keys are normed.
        recipe: see `Recipe`.
        progress: called after every layer.

    Returns:
        The converted model and its parameters, in the dtype of the source; all that is not
        attention is shared with it.

    Raises:
        ValueError: sizes that the model or the calibration cannot serve, stats of another model,
            or weights that hold NaN, before or after.
    """
    params = on_automatic_mesh(params)
    check_params(params)
    stats = checked_stats(model, stats)
    sizes, recipe, mode = settle(
        model, stats.tokens, kv_rank, rope_dim, v_head_dim, exportable, mode, recipe
    )
    if q_rank is not None:
        check_query_rank(model, stats, q_rank, mode)
    converted = []
    x = embed(model.config, params, stats.tokens)
    for layer in decouple_layers(model, params, stats, sizes, recipe, mode, Streams(x, x)):
        config, attn = layer.layout(layer.final)
        if q_rank is not None:
            assert isinstance(config, MLAConfig)
            second = stats.layers[layer.index].input_second
            assert second is not None
            config, attn = low_rank_query(config, attn, q_rank, second)
        converted.append((config, attn))
        if progress is not None:
            progress(layer)
    return with_attention(model, params, converted)


def settle(
    model: Transformer,
    tokens: Int[np.ndarray, "S T"],
    kv_rank: int | Sequence[int],
    rope_dim: int | Sequence[int],
    v_head_dim: int | None,
    exportable: bool,
    mode: str,
    recipe: Recipe,
) -> tuple[list[Sizes], Recipe, str]:
    """Sizes, recipe and mode of a conversion, checked before anything is computed.

    Raises:
        ValueError: as `to_decoupled`.
    """
    bases = gqa_layers(model)
    if mode != "auto" and mode not in LAYOUTS:
        raise ValueError(f"mode is {mode!r}, expected one of auto, {', '.join(LAYOUTS)}")
    if v_head_dim is not None and not recipe.refit:
        raise ValueError("v_head_dim needs a recipe that refits: the closed form keeps H")
    if exportable:
        recipe = exportable_recipe(recipe, bases, rope_dim)
        mode = "fold" if mode == "auto" else mode
    if mode == "fold" and any(base.qk_norm is not None for base in bases):
        raise ValueError("keys with QK-norm cannot be folded into their projections; mode='post'")
    return layer_sizes(bases, tokens.size, kv_rank, rope_dim, v_head_dim), recipe, mode


def decouple_layers(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats | None,
    sizes: Sequence[Sizes],
    recipe: Recipe,
    mode: str,
    streams: Streams,
    first: int = 0,
) -> Iterator[ConvertedLayer]:
    """Converts one layer after the other; each is read when its turn comes, and then let go.

    With a recipe that refits, the calibration text runs through the original and the converted
    layers side by side: the residual streams are what is held.

    Args:
        stats: None: the moments of each layer are taken from its stream, `REPLAY` sequences at a
            time: the same as those of `calibrate` on such batches, and never those of all layers.
        streams: in front of layer `first`.
    """
    bases = gqa_layers(model)
    for index in range(first, len(bases)):
        converted = _decouple_layer(
            model.config, params, index, stats, sizes[index], recipe, mode, streams
        )
        streams = converted.streams
        yield converted
        del converted  # before the next one is read


def _decouple_layer(
    config: ModelConfig,
    params: Mapping[str, Any],
    index: int,
    stats: Stats | None,
    size: Sizes,
    recipe: Recipe,
    mode: str,
    streams: Streams,
) -> ConvertedLayer:
    """One layer; see `decouple_layers`."""
    own, layer = params[f"layers_{index}"], config.layers[index]
    check_finite(own, f"layers_{index}/")
    check_streams(streams._asdict(), index, params)
    original, converted = streams
    base = layer.attention
    assert isinstance(base, GQAConfig)
    layout = functools.partial(LAYOUTS[mode_of(mode, base)], base, own["attn"])
    block = block_kind(config, layer).block
    moments = _observe_replay(block, own, original) if stats is None else stats.layers[index]
    check_moments(moments, index, params)
    settings = (base, own["attn"], moments)
    partial = close(*settings, None, size.rope_dim, recipe)
    seen = _observe_replay(block, own, converted) if recipe.recalibrate else None
    low = final = close(*settings, size.rank, size.rope_dim, recipe, seen)
    if recipe.refit:
        final = refit_scores(block, own, low, original, converted)
        target = output_target(config, layer, own, original, converted)
        final = refit_outputs(block, own, final, converted, target, size.v_head_dim, recipe.biased)
    if recipe.refit or stats is None:
        original = replay(config, layer, own, original)
    if recipe.refit or recipe.recalibrate:
        attention, attn = layout(final if recipe.refit else partial)
        new = LayerConfig(attention, layer.mlp)
        converted = replay(config, new, {**own, "attn": attn}, converted)
    return ConvertedLayer(index, own, Streams(original, converted), partial, low, final, layout)


def check_streams(streams: Mapping[str, jax.Array], index: int, params: Mapping[str, Any]) -> None:
    """Raises ValueError for residual streams in front of a layer that are not finite."""
    name = first_not_finite(streams)
    if name is not None:
        check_params(params)
        raise ValueError(
            f"layer {index}: its input in the {name} model is NaN or infinite: {OVERFLOW}"
        )


def mode_of(mode: str, base: GQAConfig) -> str:
    """ "auto": fold where that is exact, else post."""
    if mode == "auto":
        return "fold" if base.qk_norm is None else "post"
    return mode


def _observe_replay(block: Block, params: dict[str, Any], x: Float[Array, "S T D"]) -> LayerStats:
    """The moments of one layer over all sequences, a few at a time."""
    total, done = None, 0
    for start in range(0, len(x), REPLAY):
        part = x[start : start + REPLAY]
        new, done = observe(block, params, part), done + len(part)
        total = new if total is None else merge(total, new, len(part) / done)
    assert total is not None
    return total


def replay(
    config: ModelConfig, layer: LayerConfig, params: dict[str, Any], x: Float[Array, "S T D"]
) -> Float[Array, "S T D"]:
    """All sequences through one layer, a few at a time."""
    kind = block_kind(config, layer)
    return _in_batches(lambda part: layer_output(kind, params, part), x)


def output_target(
    config: ModelConfig,
    layer: LayerConfig,
    params: dict[str, Any],
    original: Float[Array, "S T D"],
    converted: Float[Array, "S T D"],
) -> Float[Array, "S T D"]:
    """What the converted attention shall give: the original's output, and what is missing so far.

    Where a norm follows the attention, its output is no longer a summand of the residual stream,
    and the original's output is all it can aim at.
    """
    kind = block_kind(config, layer)
    out = _in_batches(lambda part: attention_output(kind.block, params, kind.pairs, part), original)
    return out if config.post_norm else out + original - converted


def _in_batches(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    parts = [function(x[i : i + REPLAY]) for i in range(0, len(x), REPLAY)]
    return jnp.concatenate(parts)
