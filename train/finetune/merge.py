"""The whole fine-tuned model from what trained and what did not."""

from __future__ import annotations

from pathlib import Path

import kvjax
from kvjax import processes
from kvjax.finite import check_finite
from kvjax.hf import layout_of
from kvjax.hf.companions import copy_companions
from train.finetune.config import TuneConfig
from train.finetune.labels import Flat, unflatten
from train.finetune.setup import Tuning
from train.finetune.step import TuneState


def merged(state: TuneState, frozen: Flat, dtype: str) -> dict:
    """Nested parameters in one dtype: the frozen ones as they were, masters rounded to it."""
    trained = {path: leaf.astype(dtype) for path, leaf in state.params.items()}
    return unflatten({**{path: leaf.astype(dtype) for path, leaf in frozen.items()}, **trained})


def write_merged(config: TuneConfig, tuning: Tuning, state: TuneState, out: Path) -> Path:
    """Writes a directory that `kvjax.load` reads, the tokenizer included.

    In the layout that the model came in: Hugging Face's (a healed export included) or the native.

    Args:
        tuning: what the run worked with.

    Raises:
        ValueError: `out` already holds a checkpoint, or a parameter is not finite.
    """
    model = tuning.step.model
    params = merged(state, tuning.frozen, config.dtype)
    check_finite(params, reason=f" in {config.dtype}; no model is written")
    kvjax.save(model, params, out, layout=layout_of(config.model))
    processes.on_writer(lambda: copy_companions(Path(model.config.source), out))
    return out
