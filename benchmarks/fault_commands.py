"""The commands that benchmarks/faults.py disturbs, and what they read."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvjax
from kvjax.endings import endings
from kvjax.hf.save import is_saved
from kvjax.nn import Transformer
from kvjax.tasks.families import rows

LAYERS = 2
"""Layers of the model: each of them is traced anew in every process."""


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: {out} is the output's place, {inputs} the folder of the inputs, and {latent} what
            the command "convert" makes of the model.
        older: words that are added for an older result, which the command replaces.
    """

    words: str
    older: str = ""


COMMANDS = {
    "convert": Command(
        "kvjax.cli convert {inputs}/model {out}/latent --method decoupled --exportable "
        "--kv-rank 12 --rope-dim 4 --calibration {inputs}/rows.npy --dtype float32 "
        "--json {out}/report.json"
    ),
    "train": Command(
        "train finetune --model {latent} --data plain:{inputs}/rows.jsonl --steps 4 "
        "--checkpoint-every 2 --log-every 1 --sequence-length 64 --batch-size 2 --merge "
        "--dtype float32 --out {out}/run"
    ),
    "eval": Command(
        "eval needle --model {inputs}/model --policy full --policy snapkv:kv_size=20 --lengths 96 "
        "--count 4 --batch-size 2 --set depths=2 --dtype float32 --out {out}/run"
    ),
    "score": Command(
        "kvjax.cli score {inputs}/model {out}/heads.json --estimator copying --samples 8 "
        "--length 112 --batch-size 2 --dtype float32",
        "--seed 1",
    ),
    "export": Command("kvjax.cli export {latent} {out}/export --dtype float32"),
    "save": Command("benchmarks.fault_commands {inputs}/model {out}/model"),
    "compress": Command(
        "kvjax.cli compress {inputs}/model {inputs}/text.txt {out}/text.kv --dtype float32 "
        "--policy snapkv:kv_size=24",
        "--policy full",
    ),
}
SAVE = "save"


def save(model: str, out: str) -> None:
    """The command "save": a model, read and written in the native layout."""
    with endings("kvjax"):
        if not is_saved(Path(out)):
            kvjax.save(*kvjax.load(model, dtype="float32"), Path(out))


def write_model(out: Path) -> None:
    """The first layers of the embedded model, with its tokenizer."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    left_out = {f"layers_{i}" for i in range(LAYERS, model.config.num_layers)}
    config = dataclasses.replace(model.config, layers=model.config.layers[:LAYERS])
    kept = {name: value for name, value in params.items() if name not in left_out}
    kvjax.save(Transformer(config), kept, out)
    for path in Path(model.config.source).glob("tokenizer*"):
        shutil.copy(path, out)


def write_inputs(folder: Path) -> None:
    """A model, rows to train on, ids and a text to read."""
    folder.mkdir(parents=True)
    write_model(folder / "model")
    lines = [json.dumps(row) + "\n" for row in rows("word_problems", 60, 0)]
    (folder / "rows.jsonl").write_text("".join(lines))
    ids = np.random.default_rng(0).integers(5, 200, (8, 32)).astype(np.int32)
    np.save(folder / "rows.npy", ids)
    (folder / "text.txt").write_text("the red fox runs . " * 20)


if __name__ == "__main__":
    save(*sys.argv[1:])
