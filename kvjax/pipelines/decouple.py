"""A checkpoint → its decoupled conversion, read, converted and written layer by layer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress, TimeElapsedColumn, track

from kvjax.config import LayerConfig
from kvjax.hf import open_params, read_model
from kvjax.hf.native import write_config, write_part
from kvjax.nn import Transformer
from kvjax.nn.loss import next_token_losses
from kvjax.pipelines.calibration_text import calibration_tokens
from kvjax.pipelines.companions import bytes_per_token, copy_companions, peak_memory
from kvjax.transmla import BEST, UNBIASED, Recipe, Stats, calibrate, published
from kvjax.transmla.allocation import choose_fold
from kvjax.transmla.calibration import embed, run_block
from kvjax.transmla.decoupled import ConvertedLayer, decouple_layers, settle
from kvjax.transmla.sizes import Sizes

BATCH = 8  # sequences that are calibrated on at a time
STAGES = ("partial_rope", "low_rank", "final")


@dataclass(frozen=True)
class Decoupling:
    """What `kvjax convert --method decoupled` was asked for.

    Attributes:
        kv_rank, rope_dim, v_head_dim, exportable, mode: as of `kvjax.transmla.decoupled`.
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

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe by its name; FreqFold 0 must have been replaced by a choice to be used."""
        recipes = {"best": BEST, "unbiased": UNBIASED, "published": published(self.fold)}
        if self.recipe not in recipes:
            raise ValueError(f"recipe is {self.recipe!r}, expected one of {', '.join(recipes)}")
        return recipes[self.recipe]

    def settled(self, model: Transformer, tokens: np.ndarray) -> tuple[list[Sizes], Recipe, str]:
        """Sizes, recipe and mode, checked against the model; see `kvjax.transmla.decoupled`."""
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


def decouple_checkpoint(source: str, out: Path, wanted: Decoupling, dtype: str) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    One layer's parameters exist at a time; besides them the calibration's residual streams.

    Returns:
        Settings, perplexity on held-out sequences before and after every step, cache bytes a token
        before and after, seconds, and the process's peak memory.

    Raises:
        ValueError: `out` is not empty, or the conversion is not possible.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, expected a new directory")
    start = time.monotonic()
    model, params = read_model(source), open_params(source, dtype)
    fit, held = calibration_tokens(source, wanted.calibration, wanted.tokens, wanted.length)
    batches = [fit[i : i + BATCH] for i in range(0, len(fit), BATCH)]
    # Refused before the calibration, not after it.
    wanted.settled(model, fit)
    stats = calibrate(
        model, params, track(batches, "calibrating", transient=True), resume=wanted.stats
    )
    calibrated = time.monotonic()
    if wanted.recipe == "published" and wanted.fold == 0:
        sizes = {"kv_rank": wanted.kv_rank, "rope_dim": wanted.rope_dim}
        wanted = dataclasses.replace(wanted, fold=choose_fold(model, params, stats, held, **sizes))
    new_model, perplexities = _convert(model, params, stats, wanted, held, out)
    copy_companions(Path(model.config.source), out)
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
        "seconds_calibration": round(calibrated - start, 1),
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak_memory(),
    }


def _convert(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    wanted: Decoupling,
    held: np.ndarray,
    out: Path,
) -> tuple[Transformer, dict[str, float]]:
    """Writes the converted model; perplexities on the held-out sequences."""
    sizes, recipe, mode = wanted.settled(model, stats.tokens)
    streams = HeldOut(model, params, held)
    configs = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("converting", total=model.config.num_layers)
        for layer in decouple_layers(model, params, stats, sizes, recipe, mode):
            name = f"layers_{layer.index}"
            own = params[name]
            config, attn = layer.layout(layer.final)
            configs.append(config)
            write_part(out, name, {**own, "attn": attn})
            streams.advance(own, layer)
            bar.advance(task)
    top = {name: params[name] for name in params if not name.startswith("layers_")}
    for name, part in top.items():
        write_part(out, name, part)
    new_model = Transformer(model.config.with_attention(tuple(configs)))
    write_config(new_model, out)
    return new_model, streams.perplexities(top)


class HeldOut:
    """Held-out text in the original model and in each step of the conversion, layer by layer."""

    def __init__(self, model: Transformer, params: Mapping[str, Any], tokens: np.ndarray):
        self.model, self.tokens = model, tokens
        x = embed(model, params, tokens)
        self.streams: dict[str, jax.Array] = dict.fromkeys(("original", *STAGES), x)

    def advance(self, own: dict[str, Any], converted: ConvertedLayer) -> None:
        """All streams through one layer."""
        layer = self.model.config.layers[converted.index]
        run = self.model.config
        self.streams["original"] = run_block(run, layer, own, self.streams["original"])
        for stage in STAGES:
            config, attn = converted.layout(getattr(converted, stage))
            new = LayerConfig(config, layer.mlp)
            self.streams[stage] = run_block(run, new, {**own, "attn": attn}, self.streams[stage])

    def perplexities(self, top: dict[str, Any]) -> dict[str, float]:
        """perplexity_<stage> for every stream."""
        names: Sequence[str] = tuple(self.streams)
        losses = (
            next_token_losses(self.model, top, self.streams[name], self.tokens) for name in names
        )
        means = [np.exp(np.asarray(loss, np.float64).mean()) for loss in losses]
        return {
            f"perplexity_{name}": round(float(mean), 4)
            for name, mean in zip(names, means, strict=True)
        }
