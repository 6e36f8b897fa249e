"""A checkpoint → its decoupled conversion, read, converted and written layer by layer."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress, TimeElapsedColumn, track

from kvjax.config import LayerConfig, ModelConfig
from kvjax.finite import CONVERTED, OVERFLOW, check_finite
from kvjax.hf import matching, open_params, read_model
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kind, embed, layer_output
from kvjax.pipelines import calibration_text
from kvjax.pipelines.calibration_text import calibration_tokens
from kvjax.pipelines.companions import bytes_per_token, peak_memory
from kvjax.pipelines.convert import write_top
from kvjax.pipelines.unfinished import Output, check_out, describe
from kvjax.ranges import COUNT, SIZE, check_ranges, optional
from kvjax.scoring import next_token_losses
from kvjax.transmla import BEST, UNBIASED, Recipe, Stats, calibrate, published
from kvjax.transmla.allocation import choose_fold
from kvjax.transmla.decoupled import REPLAY, ConvertedLayer, Streams, decouple_layers, settle
from kvjax.transmla.sizes import Sizes

STAGES = ("partial_rope", "low_rank", "final")
RANGES = {
    "kv_rank": COUNT,
    "rope_dim": SIZE,
    "v_head_dim": optional(COUNT),
    "fold": SIZE,
    **calibration_text.RANGES,
}
"""The numbers of a `Decoupling`."""
HELD_OUT = tuple(f"held_{step}" for step in ("original", *STAGES))


@dataclass(frozen=True)
class Decoupling:
    """What `kvjax convert --method decoupled` was asked for.

    Attributes:
        kv_rank, rope_dim, v_head_dim, exportable, mode: as of `kvjax.transmla.to_decoupled`.
        recipe: "best", "unbiased", or "published" with FreqFold `fold`; 0 takes the fold with the
            least loss on the held-out sequences.
        calibration, tokens, length: see `calibration_tokens`.
        stats: keeps the moments, so that an interrupted or another conversion need not read the
            text again; None: they are not kept.
    """

    kv_rank: int
    rope_dim: int
    calibration: Path
    v_head_dim: int | None = None
    exportable: bool = False
    mode: str = "auto"
    recipe: str = "best"
    fold: int = 1
    tokens: int = 32_768
    length: int = 256
    stats: Path | None = None

    def __post_init__(self) -> None:
        check_ranges(vars(self), RANGES)

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe by its name; FreqFold 0 must have been replaced by a choice to be used."""
        recipes = {"best": BEST, "unbiased": UNBIASED, "published": published(self.fold)}
        if self.recipe not in recipes:
            raise ValueError(f"recipe is {self.recipe!r}, expected one of {', '.join(recipes)}")
        return recipes[self.recipe]

    def settled(self, model: Transformer, tokens: np.ndarray) -> tuple[list[Sizes], Recipe, str]:
        """Sizes, recipe and mode, checked against the model; see `kvjax.transmla.to_decoupled`."""
        return settle(
            model,
            tokens,
            self.kv_rank,
            self.rope_dim,
            self.v_head_dim,
            self.exportable,
            self.mode,
            self.parsed_recipe,
        )

    def request(self, fit: np.ndarray, held: np.ndarray) -> dict[str, Any]:
        """All that the result depends on beside the model, as JSON values."""
        settings = {k: v for k, v in vars(self).items() if k not in ("calibration", "stats")}
        text = hashlib.sha256(fit.tobytes() + held.tobytes()).hexdigest()[:12]
        return {"method": "decoupled", **settings, "text": text}


def decouple_checkpoint(
    source: str, out: Path, wanted: Decoupling, dtype: str, mesh: str | None = None
) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    One layer's parameters and moments exist at a time, and then one of the matrices of the
    vocabulary; besides them the residual streams of the calibration and the held-out text. The
    moments of all layers exist where they are kept in a file, and all layers too where FreqFold is
    to be chosen. The same call after it was stopped goes on behind the last layer that was written.

    Args:
        mesh: devices that each layer is spread over, see `kvjax.mesh.parse_mesh`; None for one.

    Returns:
        Settings, perplexity on held-out sequences before and after every step, cache bytes a token
        before and after, seconds, and the process's peak memory.

    Raises:
        ValueError: `out` is not empty, or holds an unfinished conversion with other settings; the
            conversion is not possible; or weights, moments or a perplexity are NaN.
    """
    start = time.monotonic()
    check_out(out)
    model = read_model(source)
    fit, held = calibration_tokens(source, wanted.calibration, wanted.tokens, wanted.length)
    wanted.settled(model, fit)  # refused before anything is computed
    params, stats = open_params(source, dtype, named_mesh(mesh)), None
    model = matching(model, params)
    with Output(out, wanted.request(fit, held) | describe(model, params, dtype)) as output:
        choose = wanted.recipe == "published" and wanted.fold == 0
        if wanted.stats is not None or choose:
            batches = [fit[i : i + REPLAY] for i in range(0, len(fit), REPLAY)]
            shown = track(batches, "calibrating", transient=True)
            stats = calibrate(model, params, shown, resume=wanted.stats)
        calibrated = time.monotonic()
        if choose:
            assert stats is not None
            ranks = {"kv_rank": wanted.kv_rank, "rope_dim": wanted.rope_dim}
            fold = choose_fold(model, params, stats, held, **ranks)
            wanted = dataclasses.replace(wanted, fold=fold)
        _write_layers(model, params, stats, wanted, fit, held, output)
        top = write_top(model, params, output)
        perplexities = _perplexities(model, top, output.finished.streams, held)
        new_model = output.complete(model, model.config.source)
    before, after = bytes_per_token(model, dtype), bytes_per_token(new_model, dtype)
    return {
        "method": "decoupled",
        "recipe": wanted.recipe + f", FreqFold {wanted.fold}" * (wanted.recipe == "published"),
        "kv_rank": wanted.kv_rank,
        "rope_dim": wanted.rope_dim,
        "bytes_per_token_before": before,
        "bytes_per_token_after": after,
        "cache": f"{after / before:.1%}",
        **perplexities,
        "calibration_tokens": int(fit.size),
        "held_out_tokens": int(held.size),
        **({} if stats is None else {"seconds_calibration": round(calibrated - start, 1)}),
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak_memory(),
    }


def _write_layers(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats | None,
    wanted: Decoupling,
    fit: np.ndarray,
    held: np.ndarray,
    output: Output,
) -> None:
    """Converts and writes the layers that are not finished, the held-out text through all steps."""
    sizes, recipe, mode = wanted.settled(model, fit)
    done = len(output.finished.attention)
    if done:
        text = Streams(*(output.finished.streams[name] for name in Streams._fields))
        steps = {name: output.finished.streams[name] for name in HELD_OUT}
    else:
        x = embed(model.config, params, np.concatenate([fit, held]))  # the embedding is read once
        text = Streams(x[: len(fit)], x[: len(fit)])
        steps = dict.fromkeys(HELD_OUT, x[len(fit) :])
    layers = decouple_layers(model, params, stats, sizes, recipe, mode, text, done)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("converting", total=model.config.num_layers, completed=done)
        for layer in layers:
            steps = _advance(model.config, layer, steps)
            config, attn = layer.attention(layer.final)
            check_finite(attn, f"layers_{layer.index}/attn/", CONVERTED)
            streams = layer.streams._asdict() | steps
            output.write_layer({**layer.source, "attn": attn}, config, streams)
            bar.advance(task)
            del layer, attn  # before the next one is read


def _advance(
    config: ModelConfig, converted: ConvertedLayer, steps: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The held-out text through one layer of the original model and of each step's."""
    layer, own = config.layers[converted.index], converted.source
    new = {HELD_OUT[0]: layer_output(block_kind(config, layer), own, steps[HELD_OUT[0]])}
    for name, stage in zip(HELD_OUT[1:], STAGES, strict=True):
        attention, attn = converted.attention(getattr(converted, stage))
        changed = LayerConfig(attention, layer.mlp)
        new[name] = layer_output(block_kind(config, changed), {**own, "attn": attn}, steps[name])
    return new


def _perplexities(
    model: Transformer, top: dict[str, Any], streams: Mapping[str, jax.Array], held: np.ndarray
) -> dict[str, float]:
    """perplexity_<step> of the held-out text."""
    losses = (next_token_losses(model, top, streams[name], held) for name in HELD_OUT)
    means = [np.exp(np.asarray(loss, np.float64).mean()) for loss in losses]
    names = ("original", *STAGES)
    for name, mean in zip(names, means, strict=True):
        if not np.isfinite(mean):
            raise ValueError(f"perplexity_{name} is {mean}, expected a number: {OVERFLOW}")
    return {f"perplexity_{n}": round(float(mean), 4) for n, mean in zip(names, means, strict=True)}
