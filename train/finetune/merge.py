"""The whole fine-tuned model from what trained and what did not."""

from __future__ import annotations

from pathlib import Path

import kvjax
from kvjax.config import GQAConfig
from kvjax.hf import layout_of
from kvjax.pipelines.companions import copy_companions
from train.finetune.config import TuneConfig
from train.finetune.labels import Flat, unflatten
from train.finetune.step import TuneState


def merged(state: TuneState, frozen: Flat, dtype: str) -> dict:
    """Nested parameters in one dtype: the frozen ones as they were, masters rounded to it."""
    trained = {path: leaf.astype(dtype) for path, leaf in state.params.items()}
    return unflatten({**{path: leaf.astype(dtype) for path, leaf in frozen.items()}, **trained})


def write_merged(config: TuneConfig, tuning, state: TuneState, out: Path) -> Path:
    """Writes a directory that `kvjax.load` reads, the tokenizer included.

    A model that Hugging Face's layout can express and that came in it goes back to it.

    Args:
        tuning: of `train.finetune.run`.

    Raises:
        ValueError: `out` already holds a checkpoint.
    """
    model = tuning.step.model
    plain = all(type(layer.attention) is GQAConfig for layer in model.config.layers)
    layout = "hf" if plain and layout_of(config.model) == "hf" else "native"
    kvjax.save(model, merged(state, tuning.frozen, config.dtype), out, layout=layout)
    copy_companions(Path(model.config.source), out)
    return out
