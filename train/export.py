"""From a checkpoint of a pretraining run to a directory that `kvjax.load` and transformers read."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

import kvjax.hf
from kvjax.finite import check_finite
from kvjax.tasks.words import to_transformers
from train import checkpoints
from train.pretrain import Run, create_run, initial_state
from train.recipe import Recipe

DTYPES = ("bfloat16", "float16", "float32")


def export(recipe: Recipe, run_dir: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Writes the newest checkpoint of `run_dir`, its configuration and its tokenizer to `out`.

    Args:
        dtype: of the written weights.

    Raises:
        ValueError: `run_dir` has no checkpoint, one that holds NaN, `out` already holds a model,
            or no such dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    run = create_run(recipe)
    state, progress = checkpoints.load_newest(run_dir, initial_state(run))
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), state.params)
    check_finite(params, reason=f" in {dtype}; no model is written")
    kvjax.hf.save(run.model, params, out, layout="hf")
    write_generation_config(run, out)
    write_tokenizer(run, out)
    print(
        f"{out}: step {progress.step}, {sum(x.size for x in jax.tree.leaves(params)):,} parameters"
    )


def write_generation_config(run: Run, out: Path) -> None:
    """generation_config.json: where a prompt begins and a generation ends."""
    ids = {"bos_token_id": run.vocab.bos_id, "eos_token_id": run.vocab.eos_id}
    config = {**ids, "pad_token_id": run.vocab.pad_id, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(run: Run, out: Path) -> None:
    """tokenizer.json, and a tokenizer_config.json that transformers 4 and 5 both read."""
    to_transformers(run.vocab, run.recipe.model.max_position_embeddings).save_pretrained(str(out))
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
