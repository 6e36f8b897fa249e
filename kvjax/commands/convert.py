"""`kvjax convert`: a checkpoint is read, converted and written one layer at a time.

`convert_to_equal_cache` and `convert_to_decoupled` are the two methods. Both run a text through the
original and the converted layers as they go, so the report says how far the models differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checks import CONVERTED, COUNT, SIZE, check_finite, check_ranges, optional
from kvjax.commands import held_out, text
from kvjax.commands.checkpoints import (
    bytes_per_token,
    count_parameters,
    probe_tokens,
    relative_change,
)
from kvjax.commands.unfinished import ConversionFolder, check_out, describe, finished_report
from kvjax.config import LayerConfig
from kvjax.endings import only_writer
from kvjax.hf import default_dtype, matching, open_params, read_model
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer, param_shapes
from kvjax.nn.transformer import block_kind, embed, hidden_logits, layer_output, output_params
from kvjax.progress import progress_bar, tracked
from kvjax.transmla import BEST, UNBIASED, Recipe, Stats, calibrate, published
from kvjax.transmla.allocation import choose_fold
from kvjax.transmla.decoupled import chosen_rope_dim, decouple_layers, settle
from kvjax.transmla.division import attention_layers
from kvjax.transmla.equal_cache import checked_inits, equal_cache_layer
from kvjax.transmla.layer import gqa_layers
from kvjax.transmla.sizes import CACHE, Sizes, chosen_widths
from kvjax.transmla.streams import REPLAY, Streams, layer_moments

PROBES = ("original", "converted")
"""The models whose residual streams an equal-cache conversion compares."""
RANGES = {
    "cache": CACHE,
    "kv_rank": optional(COUNT),
    "rope_dim": optional(SIZE),
    "v_head_dim": optional(COUNT),
    "fold": SIZE,
    "calibration_tokens": text.RANGES["tokens"],
    "calibration_length": text.RANGES["length"],
}
"""What the numbers of `DecoupledSettings` may be."""


@dataclass(frozen=True)
class EqualCacheSettings:
    """Read by --method equal_cache only.

    Attributes:
        init: svd_global, svd_per_head, identity or svd_complex
        rope_site: after_up or before_up
    """

    init: str = "svd_global"
    rope_site: str = "after_up"


@dataclass(frozen=True)
class DecoupledSettings:
    """Read by --method decoupled only.

    Attributes:
        cache: cached numbers, as a share of those of keys and values; instead of kv_rank
        kv_rank: width of the cached latent; None: what rope_dim leaves of the cache, which is half
            of keys and values, or 576 numbers where these are less
        rope_dim: width of the cached rotary key; None: what loses least by the calibration
        calibration: text, or .npy of token ids [S, T], to calibrate on (required)
        v_head_dim: width of a head's output
        exportable: keep to what DeepSeek-V3's layout can express
        mode: fold (ordinary MLA), post (keeps QK-norms and their projections), or auto: fold where
            a model has no QK-norm
        recipe: best; unbiased, for exports with norm rms; or published, the paper's method
        fold: FreqFold of the published recipe; 0: the fold with the least held-out loss
        calibration_tokens: most tokens to use
        calibration_length: tokens per sequence, for texts
        stats: file that keeps the moments, for the next conversion with the same text
    """

    cache: float | None = None
    kv_rank: int | None = None
    rope_dim: int | None = None
    calibration: Path | None = None
    v_head_dim: int | None = None
    exportable: bool = False
    mode: str = "auto"
    recipe: str = "best"
    fold: int = 1
    calibration_tokens: int = 32_768
    calibration_length: int = 256
    stats: Path | None = None

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES)

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe that `recipe` names. With fold 0, choose the fold before you use the recipe.

        Raises:
            ValueError: an unknown name.
        """
        recipes = {"best": BEST, "unbiased": UNBIASED, "published": published(self.fold)}
        if self.recipe not in recipes:
            raise ValueError(f"recipe is {self.recipe!r}, expected one of {', '.join(recipes)}")
        return recipes[self.recipe]

    @property
    def chooses_fold(self) -> bool:
        """Whether FreqFold is to be chosen by the loss on the held-out text."""
        return self.recipe == "published" and self.fold == 0

    def read_text(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [S, T] to calibrate on and [H, T] held out, of the tokenizer of `source`.

        Raises:
            ValueError: no calibration file was named; see also `calibration_tokens`.
        """
        if self.calibration is None:
            raise ValueError("method 'decoupled' needs --calibration FILE, a text or token ids")
        counts = self.calibration_tokens, self.calibration_length
        return text.calibration_tokens(source, self.calibration, *counts)

    def settled(self, model: Transformer, tokens: np.ndarray) -> tuple[list[Sizes], Recipe, str]:
        """Sizes, recipe and mode, checked against the model; see `kvjax.transmla.to_decoupled`."""
        return settle(
            model,
            tokens,
            self.cache,
            self.kv_rank,
            self.rope_dim,
            self.v_head_dim,
            self.exportable,
            self.mode,
            self.parsed_recipe,
        )

    def widths(self, model: Transformer) -> dict[str, Any]:
        """kv_rank and rope_dim for this model; one number, or one for each layer."""
        bases = gqa_layers(model)
        wanted = (self.cache, self.kv_rank, self.rope_dim, self.exportable)
        return dict(zip(("kv_rank", "rope_dim"), chosen_widths(bases, *wanted), strict=True))

    @property
    def leaves_division_open(self) -> bool:
        """Whether neither width is given, so that the moments may choose."""
        return self.kv_rank is None and self.rope_dim is None

    def request(self, widths: dict[str, Any], fit: np.ndarray, held: np.ndarray) -> dict[str, Any]:
        """Everything except the model that the result depends on, as JSON values.

        The files of unfinished conversions hold these keys, so they keep their names.
        """
        left_out = ("calibration", "stats", "cache")
        settings = {k: v for k, v in vars(self).items() if k not in left_out}
        settings |= {"cache": self.cache} if self.leaves_division_open else widths
        settings = {k.removeprefix("calibration_"): v for k, v in settings.items()}
        digest = hashlib.sha256(fit.tobytes() + held.tobytes()).hexdigest()[:12]
        return {"method": "decoupled", **settings, "text": digest}


def convert_to_equal_cache(
    source: str,
    out: Path,
    wanted: EqualCacheSettings,
    dtype: str | None = None,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    Memory holds one layer's parameters, and at the end one matrix of the vocabulary. If a run was
    stopped, the same call continues after the last layer that was written.

    Args:
        dtype: of the weights; None: see `kvjax.hf.default_dtype`.
        mesh: devices that each layer is sharded over, see `kvjax.mesh.parse_mesh`; None for one.

    Returns:
        Method and settings, cache bytes per token before and after, parameters before and after,
        the largest change of a logit on random tokens relative to the largest logit, seconds, and
        the process's peak memory in bytes.

    Raises:
        ValueError: `out` is not empty, or holds a conversion with other settings; the conversion
            is not possible; or weights or logits hold NaN.
    """
    start, dtype = time.monotonic(), dtype or default_dtype()
    check_out(out)
    model = read_model(source)
    inits = checked_inits(wanted.init, None, wanted.rope_site)
    gqa_layers(model)  # refuses a model without grouped-query attention before weights are read
    settings = {"method": "equal_cache", **vars(wanted)}
    params = open_params(source, dtype, named_mesh(mesh))
    model = matching(model, params)
    request = settings | describe(model, params, dtype)
    if (earlier := finished_report(out, request)) is not None:
        return earlier
    with ConversionFolder(out, request) as folder:
        _write_equal_cache_layers(model, params, folder, inits, wanted.rope_site)
        top = _write_outside_layers(model, params, folder)
        streams = folder.finished.streams
        logits = (hidden_logits(model.config, top, streams[name]) for name in PROBES)
        change, new_model = relative_change(*logits), folder.converted(model)
        report = {
            **settings,
            "bytes_per_token_before": bytes_per_token(model, dtype),
            "bytes_per_token_after": bytes_per_token(new_model, dtype),
            "parameters_before": count_parameters(param_shapes(model.config)),
            "parameters_after": count_parameters(param_shapes(new_model.config)),
            "relative_logit_change": change,
            "seconds": round(time.monotonic() - start, 1),
            "peak_memory_bytes": peak_memory(),
        }
        folder.complete(new_model, model.config.source, report)
    return report


def _write_equal_cache_layers(
    model: Transformer,
    params: Mapping[str, Any],
    folder: ConversionFolder,
    inits: Any,
    rope_site: str,
) -> None:
    """Converts and writes the unfinished layers; random tokens run through both models."""
    streams = folder.finished.streams
    if not folder.finished.attention:
        streams = dict.fromkeys(PROBES, embed(model.config, params, probe_tokens(model.config)))
    for index in range(len(folder.finished.attention), model.config.num_layers):
        own, layer = params[f"layers_{index}"], model.config.layers[index]
        check_finite(own, f"layers_{index}/")
        base = gqa_layers(model)[index]
        config, attn = equal_cache_layer(index, base, own["attn"], inits, rope_site)
        check_finite(attn, f"layers_{index}/attn/", CONVERTED)
        new, new_own = LayerConfig(config, layer.mlp), {**own, "attn": attn}
        streams = {
            "original": layer_output(block_kind(model.config, layer), own, streams["original"]),
            "converted": layer_output(block_kind(model.config, new), new_own, streams["converted"]),
        }
        folder.write_layer(new_own, config, streams)
        # Without this, two layers would be in memory while the next one is read.
        del own, attn, new_own


def convert_to_decoupled(
    source: str,
    out: Path,
    wanted: DecoupledSettings,
    dtype: str | None = None,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    Memory holds one layer's parameters and moments, the residual streams of the calibration text
    and of the held-out text, and at the end one matrix of the vocabulary. With `stats` it also
    holds the moments of all layers; to choose FreqFold it also holds all layers. If a run was
    stopped, the same call continues after the last layer that was written.

    Args:
        dtype: of the weights; None: see `kvjax.hf.default_dtype`.
        mesh: devices that each layer is sharded over, see `kvjax.mesh.parse_mesh`; None for one.

    Returns:
        Settings, perplexity on held-out sequences before and after every step, the number of layers
        that kept their fits (these sequences decide it), cache bytes per token before and after,
        seconds, and the process's peak memory in bytes.

    Raises:
        ValueError: no calibration file; `out` is not empty, or holds a conversion with other
            settings; the conversion is not possible; or weights, moments or a perplexity are NaN.
    """
    start, dtype = time.monotonic(), dtype or default_dtype()
    # Refuse bad input before anything large is read or computed.
    check_out(out)
    model = read_model(source)
    fit, held = wanted.read_text(source)
    wanted.settled(model, fit)
    params, stats = open_params(source, dtype, named_mesh(mesh)), None
    model = matching(model, params)
    request = wanted.request(wanted.widths(model), fit, held) | describe(model, params, dtype)
    if (earlier := finished_report(out, request)) is not None:
        return earlier
    with ConversionFolder(out, request) as folder:
        # Moments of all layers at once are needed only to keep them or to try several folds.
        if wanted.stats is not None or wanted.chooses_fold:
            batches = [fit[i : i + REPLAY] for i in range(0, len(fit), REPLAY)]
            shown = tracked(batches, "calibrating", len(batches))
            # Conversions with the same text share the file of moments.
            file = wanted.stats
            with contextlib.nullcontext() if file is None else only_writer(file):
                stats = calibrate(model, params, shown, resume=file)
        calibrated = time.monotonic()
        chosen = _chosen(model, params, stats, wanted, fit, folder)
        wanted = wanted if chosen is None else dataclasses.replace(wanted, rope_dim=chosen)
        widths = wanted.widths(model)
        if wanted.chooses_fold:
            assert stats is not None
            fold = choose_fold(model, params, stats, held, **widths)
            wanted = dataclasses.replace(wanted, fold=fold)
        # Convert, then judge the held-out text with the weights that follow the last layer.
        _write_decoupled_layers(model, params, stats, wanted, fit, held, folder)
        top = _write_outside_layers(model, params, folder)
        fitted, streams = model.config.num_layers, folder.finished.streams
        if wanted.parsed_recipe.refit:
            fitted = held_out.fitted_layers(model, top, streams, held)
            folder.take_other(fitted)
        perplexities = held_out.perplexities(model, top, streams, fitted, held)
        new_model = folder.converted(model)
        before, after = bytes_per_token(model, dtype), bytes_per_token(new_model, dtype)
        report = {
            "method": "decoupled",
            "recipe": wanted.recipe + f", FreqFold {wanted.fold}" * (wanted.recipe == "published"),
            **widths,
            "bytes_per_token_before": before,
            "bytes_per_token_after": after,
            "cache": f"{after / before:.1%}",
            **perplexities,
            **({"fitted_layers": fitted} if wanted.parsed_recipe.refit else {}),
            "calibration_tokens": int(fit.size),
            "held_out_tokens": int(held.size),
            **({} if stats is None else {"seconds_calibration": round(calibrated - start, 1)}),
            "seconds": round(time.monotonic() - start, 1),
            "peak_memory_bytes": peak_memory(),
        }
        folder.complete(new_model, model.config.source, report)
    return report


def _chosen(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats | None,
    wanted: DecoupledSettings,
    fit: np.ndarray,
    folder: ConversionFolder,
) -> int | None:
    """The rope_dim of the finished layers, or what loses least by the moments; None if given."""
    if not wanted.leaves_division_open:
        return None
    finished = [width for config in folder.finished.attention for width in config.cached_widths[1:]]
    if any(finished):
        return max(finished)
    layers = layer_moments(model, params, fit)
    if stats is not None:
        layers = attention_layers(params, stats)
    shown = tracked(layers, "choosing rope_dim", model.config.num_layers)
    widths = wanted.cache, wanted.kv_rank, wanted.rope_dim, wanted.exportable
    return chosen_rope_dim(model, shown, *widths, wanted.parsed_recipe)


def _write_decoupled_layers(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats | None,
    wanted: DecoupledSettings,
    fit: np.ndarray,
    held: np.ndarray,
    folder: ConversionFolder,
) -> None:
    """Converts and writes the unfinished layers; the held-out text runs through every stage."""
    sizes, recipe, mode = wanted.settled(model, fit)
    done = len(folder.finished.attention)
    if done:
        streams = dict(folder.finished.streams)
        replayed, steps = Streams(*(streams.pop(name) for name in Streams._fields)), streams
    else:
        # One call for both texts: the embedding is read from disk once.
        x = embed(model.config, params, np.concatenate([fit, held]))
        replayed = Streams(x[: len(fit)], x[: len(fit)])
        names = held_out.stream_names(model.config.num_layers, recipe.refit)
        steps = dict.fromkeys(names, x[len(fit) :])
    layers = decouple_layers(model, params, stats, sizes, recipe, mode, replayed, done)
    with progress_bar() as bar:
        number = model.config.num_layers
        task = bar.add_task("converting", total=number, completed=done, items="")
        for layer in layers:
            steps = held_out.advance(model.config, layer, steps)
            config, attn = layer.attention(layer.final)
            check_finite(attn, f"layers_{layer.index}/attn/", CONVERTED)
            streams, other = layer.streams._asdict() | steps, None
            if recipe.refit:
                closed, closed_attn = layer.attention(layer.low_rank)
                other = {**layer.source, "attn": closed_attn}, closed
            folder.write_layer({**layer.source, "attn": attn}, config, streams, other)
            bar.advance(task)
            # Without this, two layers would be in memory while the next one is read.
            del layer, attn, other


def _write_outside_layers(
    model: Transformer, params: Mapping[str, Any], folder: ConversionFolder
) -> dict[str, Any]:
    """Writes the parameters outside the layers one by one; returns those that make the logits."""
    needed, kept = output_params(model.config), {}
    names = [name for name in params if not name.startswith("layers_")]
    # Parameters that are kept come last, so an embedding that is not kept is freed before them.
    for name in sorted(names, key=lambda name: name in needed):
        value = params[name]
        check_finite({name: value})
        folder.write_part(name, value)
        if name in needed:
            kept[name] = value
        del value
    return kept


def peak_memory() -> int:
    """The process's peak resident set, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
