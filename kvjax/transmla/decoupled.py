"""GQA → multi-head latent attention with a smaller cache (TransMLA v3 to v5, arXiv 2502.07864).

`to_decoupled` converts a model in memory. `decouple_layers` converts one layer after the other, for
checkpoints that are read and written a layer at a time; it fits all layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from kvjax.checks import check_finite, check_params, check_ranges
from kvjax.config import AttentionConfig, GQAConfig, LayerConfig, MLAConfig, ModelConfig, of_kind
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import (
    Transformer,
    block_kind,
    embed,
)
from kvjax.transmla.calibration import Stats, check_moments
from kvjax.transmla.closed_form import BEST, Recipe, close, low_rank_query
from kvjax.transmla.depth import Attention, FittedDepth, divided
from kvjax.transmla.division import Layers, attention_layers, mean_errors
from kvjax.transmla.layer import (
    LatentLayer,
    check_foldable,
    folded,
    gqa_layers,
    over_heads,
    with_attention,
)
from kvjax.transmla.refit_outputs import refit_outputs
from kvjax.transmla.refit_queries import refit_queries
from kvjax.transmla.rotary import by_energy
from kvjax.transmla.sizes import (
    CACHE,
    Sizes,
    Widths,
    check_query_rank,
    checked_stats,
    chosen_widths,
    exportable_recipe,
    layer_sizes,
    rope_dims_to_choose,
)
from kvjax.transmla.streams import (
    Streams,
    check_streams,
    error_size,
    observe_replay,
    output_target,
    replay,
)

MODES = {"fold": folded, "post": over_heads}
"""mode → the function that makes config and parameters of a converted layer."""


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer after each step of its conversion.

    Attributes:
        index: number of the layer.
        source: the parameters of the original layer.
        streams: the streams after the layer. A stream that neither the recipe nor the moments need
            stays as it was.
        partial_rope: after partial RoPE, with the full rank.
        low_rank: after the joint PCA, with the latent cut to its rank.
        final: after the least squares.
        attention: makes config and parameters of one of these steps, in the dtype of the source.
    """

    index: int
    source: dict[str, Any]
    streams: Streams
    partial_rope: LatentLayer
    low_rank: LatentLayer
    final: LatentLayer
    attention: Callable[[LatentLayer], tuple[AttentionConfig, dict[str, Any]]]


@automatic_axes()
def to_decoupled(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    *,
    cache: float | None = None,
    kv_rank: Widths | None = None,
    rope_dim: Widths | None = None,
    v_head_dim: int | None = None,
    q_rank: int | None = None,
    exportable: bool = False,
    mode: str = "auto",
    recipe: Recipe = BEST,
    held_out: Int[np.ndarray, "H T"] | None = None,
    progress: Callable[[ConvertedLayer], None] | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """Converts GQA layers to latent attention that caches kv_rank + rope_dim numbers per token.

    Nothing is trained: the conversion is closed-form algebra on second moments, and least squares
    on the calibration text, in as many first layers as lower the loss on held-out text.
    docs/decoupled.md has the method and its measurements.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches)
        >>> mla_model, mla_params = kvjax.transmla.to_decoupled(model, params, stats, cache=0.5)

    Args:
        model: with GQA in every layer.
        params: of `model`. On a mesh, the result is placed on the same mesh.
        stats: from `calibrate`, on text of the kind that the model will read.
        cache: what a token may have in the cache, as a share of its keys and values: above 0, at
            most 1. It stands for kv_rank + rope_dim numbers.
        kv_rank, rope_dim: widths of the latent and of the rotary key, one number for all layers or
            one for each. None: the division of `cache` that loses least by the moments of the
            calibration; see `chosen_widths` for the other cases. Layers without RoPE have no rotary
            key, whatever rope_dim is.
        v_head_dim: width of a head's output before the output projection; None: H. Up to the rank
            a larger width fits better, at the cost of larger v_up and o. Needs a recipe that
            refits.
        q_rank: rank of the query projection (PCA of the queries); None: full. Needs folded layers
            and `calibrate(…, input_moments=True)`. It makes the weights smaller, not the cache.
        exportable: use only what the DeepSeek-V3 layout can express: folded layers with one
            rotating component for each of rope_dim / 2 evenly spaced frequencies.
        mode: "fold" multiplies the maps into the projections (ordinary MLA). "post" keeps the
            projections and norms of GQA and applies the maps after them. "auto" folds layers
            without QK-norm.
        recipe: the steps of the conversion, see `Recipe`.
        held_out: int32 token ids that decide how many layers are fitted, see
            `kvjax.transmla.depth`; with no sequences all are. None: every eighth sequence of the
            calibration, which is then not fitted.
        progress: called after every layer, in closed form and then with fits.

    Returns:
        The converted model and its parameters, in the dtype of the source. Parameters outside of
        the attention are shared with `params`.

    Raises:
        ValueError: sizes that do not fit the model or the calibration, stats of another model,
            or weights that hold NaN before or after the conversion.
    """
    check_fits(model, params)
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"recipe is {recipe!r}, expected a Recipe such as kvjax.transmla.BEST or UNBIASED"
        )
    params = on_automatic_mesh(params)
    check_params(params)
    stats = checked_stats(model, stats)
    wanted = cache, kv_rank, rope_dim, exportable
    chosen = chosen_rope_dim(model, attention_layers(params, stats), *wanted, recipe)
    rope_dim = rope_dim if chosen is None else chosen
    sizes, recipe, mode = settle(
        model, stats.tokens, cache, kv_rank, rope_dim, v_head_dim, exportable, mode, recipe
    )
    if q_rank is not None:
        check_query_rank(model, stats, q_rank, mode)
    converted = _convert(model, params, stats, sizes, recipe, mode, held_out, progress)
    if q_rank is not None:
        for index, (config, attn) in enumerate(converted):
            second = stats.layers[index].input_second
            assert second is not None
            converted[index] = low_rank_query(of_kind(config, MLAConfig), attn, q_rank, second)
    return with_attention(model, params, converted)


def chosen_rope_dim(
    model: Transformer,
    layers: Layers,
    cache: float | None,
    kv_rank: Widths | None,
    rope_dim: Widths | None,
    exportable: bool,
    recipe: Recipe,
) -> int | None:
    """The rope_dim that loses least by the moments; None where that is not left to them.

    A published placement keeps its sizes, see `kvjax.transmla.sizes.chosen_widths`.

    Args:
        layers: read only where there is something to choose.
    """
    bases = gqa_layers(model)
    check_ranges({"cache": cache}, {"cache": CACHE})
    numbers, choice = rope_dims_to_choose(bases, cache, kv_rank, rope_dim, exportable)
    if not choice or not (exportable or recipe.placement is by_energy):
        return None

    def recipe_of(width: int) -> Recipe:
        return exportable_recipe(recipe, bases, width) if exportable else recipe

    errors = mean_errors(bases, layers, numbers, choice, recipe_of)
    return choice[int(np.argmin(errors))]


def _convert(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    sizes: Sequence[Sizes],
    recipe: Recipe,
    mode: str,
    held_out: Int[np.ndarray, "H T"] | None,
    progress: Callable[[ConvertedLayer], None] | None,
) -> list[Attention]:
    """Every layer in closed form; then fits of the first ones, as far as they lower the loss."""

    def layers(recipe: Recipe, tokens: np.ndarray) -> Iterator[Attention]:
        x = embed(model.config, params, tokens)
        for layer in decouple_layers(model, params, stats, sizes, recipe, mode, Streams(x, x)):
            if progress is not None:
                progress(layer)
            yield layer.attention(layer.final)

    closed = list(layers(dataclasses.replace(recipe, refit=False), stats.tokens))
    if not recipe.refit:
        return closed
    read, judging = divided(stats.tokens) if held_out is None else (stats.tokens, held_out)
    depth, fitted = FittedDepth(model, params, closed, judging), list[Attention]()
    for attention in layers(recipe, read):
        fitted.append(attention)
        if not depth.add(attention):
            break
    return fitted[: depth.best] + closed[depth.best :]


def settle(
    model: Transformer,
    tokens: Int[np.ndarray, "S T"],
    cache: float | None,
    kv_rank: Widths | None,
    rope_dim: Widths | None,
    v_head_dim: int | None,
    exportable: bool,
    mode: str,
    recipe: Recipe,
) -> tuple[list[Sizes], Recipe, str]:
    """Checks the arguments of a conversion before anything is computed.

    Args:
        tokens: the calibration text; the other arguments are those of `to_decoupled`.

    Returns:
        The sizes of every layer, the recipe and the mode to use.

    Raises:
        ValueError: sizes, recipe and mode that do not fit together, or do not fit the model.
    """
    bases = gqa_layers(model)
    if mode != "auto" and mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of auto, {', '.join(MODES)}")
    if v_head_dim is not None and not recipe.refit:
        raise ValueError(
            "v_head_dim is given with a recipe in closed form, expected one that fits the outputs, "
            "such as kvjax.transmla.BEST"
        )
    kv_rank, rope_dim = chosen_widths(bases, cache, kv_rank, rope_dim, exportable)
    if exportable:
        recipe = exportable_recipe(recipe, bases, rope_dim)
        mode = "fold" if mode == "auto" else mode
    for base in bases if mode == "fold" else []:
        check_foldable(base)
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
    """Converts one layer after the other; the parameters of one layer exist at a time.

    With a recipe that refits, the calibration text passes through the original and the converted
    layers side by side, and the residual streams of both are kept.

    Args:
        params: may be lazy: each layer is read when its turn comes.
        stats: None measures the moments of each layer from its stream, `REPLAY` sequences at a
            time. They equal those of `calibrate` on such batches.
        sizes, recipe, mode: from `settle`.
        streams: the streams before layer `first`.
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
    """Converts one layer; see `decouple_layers`."""
    own, layer = params[f"layers_{index}"], config.layers[index]
    check_finite(own, f"layers_{index}/")
    check_streams(streams._asdict(), index, params)
    original, converted = streams
    base = of_kind(layer.attention, GQAConfig)
    make = functools.partial(MODES[mode_of(mode, base)], base, own["attn"])
    block = block_kind(config, layer).block
    moments = observe_replay(block, own, original) if stats is None else stats.layers[index]
    check_moments(moments, index, params)
    # Closed form: partial RoPE alone, then with the latent cut to its rank.
    settings = (base, own["attn"], moments)
    partial = close(*settings, None, size.rope_dim, recipe)
    seen = observe_replay(block, own, converted) if recipe.recalibrate else None
    low = final = close(*settings, size.rank, size.rope_dim, recipe, seen)
    # Least squares against the original layer, on the text as the converted layers give it.
    if recipe.refit:
        final = refit_queries(block, own, low, original, converted)
        target = output_target(config, layer, own, original, converted)
        divisor = error_size(config, original, target)
        final = refit_outputs(
            block, own, final, converted, target, divisor, size.v_head_dim, recipe.biased
        )
    # The text moves on through both layers, where a later step reads it.
    if recipe.refit or stats is None:
        original = replay(config, layer, own, original)
    if recipe.refit or recipe.recalibrate:
        attention, attn = make(final if recipe.refit else partial)
        new = LayerConfig(attention, layer.mlp)
        converted = replay(config, new, {**own, "attn": attn}, converted)
    return ConvertedLayer(index, own, Streams(original, converted), partial, low, final, make)


def mode_of(mode: str, base: GQAConfig) -> str:
    """The mode of one layer: "auto" is "fold" without QK-norm, where that is exact, else "post"."""
    if mode == "auto":
        return "fold" if base.qk_norm is None else "post"
    return mode
