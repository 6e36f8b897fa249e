"""Decoupled conversions of a real checkpoint: perplexity and CPU seconds, training-free.

    python -m benchmarks.transmla_real MODEL TEXT [--out benchmarks/results/transmla_real.json]

Calibrates on the first sequences of the text and tests on those from its middle; no special tokens.
A conversion gets nothing but the calibration and its share of the cache; with --choose, rope_dim is
chosen on every eighth sequence of the calibration (`choose_rope_dim`). The test text is read once
for each conversion. --stats keeps the calibration, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import kvjax
from benchmarks.environment import environment
from kvjax.config import MLAConfig, of_kind
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.tasks import perplexity
from kvjax.transmla import BEST, Stats, calibrate, choose_rope_dim, convert
from kvjax.transmla.depth import divided
from kvjax.transmla.layer import gqa_layers
from kvjax.transmla.sizes import components

RECIPES = {"closed form": dataclasses.replace(BEST, refit=False), "default": BEST}


def cpu_seconds() -> float:
    """User and system time of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def token_list(model: str, text: Path) -> list[int]:
    """The token ids of a text file, without special tokens."""
    with gzip.open(text, "rt", encoding="utf-8") as file:
        string = file.read()
    tokenizer: Any = kvjax.load_tokenizer(model)
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def sequences(ids: Sequence[int], start: int, count: int, length: int) -> np.ndarray:
    """int32 [count, length] consecutive tokens from `start`."""
    return np.asarray(ids[start : start + count * length], np.int32).reshape(count, length)


def batches(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """The sequences in batches."""
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def sizes(model: Transformer) -> dict[str, int]:
    """The widths of the first layer's cache."""
    attention = of_kind(model.config.layers[0].attention, MLAConfig)
    return {"kv_rank": attention.kv_lora_rank, "rope_dim": attention.qk_rope_head_dim}


def parser_of(description: str | None, out: str) -> argparse.ArgumentParser:
    """Options of a benchmark that calibrates on a text's beginning and tests from its middle."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("text", type=local_path)
    parser.add_argument("--out", type=local_path, default=Path(out))
    parser.add_argument("--calibration", type=int, default=128, help="sequences of 256 tokens")
    parser.add_argument("--test", type=int, default=16, help="sequences of 512 tokens of a text")
    return parser


def main() -> None:
    parser = parser_of(__doc__, "transmla_real.json")
    parser.add_argument("--fits", type=int, help="sequences that the fits read; all by default")
    parser.add_argument("--caches", default="0.75,0.5,0.28125")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--choose", action="store_true", help="choose rope_dim by held-out loss")
    parser.add_argument("--stats", type=local_path, help="file that keeps the calibration")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    model, params = kvjax.load(args.model, dtype=args.dtype)
    ids = token_list(args.model, args.text)
    calibration = sequences(ids, 0, args.calibration, 256)
    test = sequences(ids, len(ids) // 2, args.test, 512)
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        about = {**environment("benchmarks.transmla_real"), "model": Path(args.model).name}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    add(cache=1.0, row="original", perplexity=perplexity(model, params, batches(test, 4)))
    start = cpu_seconds()
    stats = calibrate(model, params, batches(calibration, 8), resume=args.stats)
    add(row="calibrate", cpu_seconds=round(cpu_seconds() - start, 1))
    text_of_fits = Stats(stats.layers, stats.tokens[: args.fits])
    whole = components(gqa_layers(model)[0])[0]
    for cache in map(float, args.caches.split(",")):
        options: dict[str, Any] = {"cache": cache}
        if args.choose:
            start, numbers = cpu_seconds(), int(cache * whole)
            held_out = divided(stats.tokens)[1]
            options["rope_dim"] = choose_rope_dim(model, params, stats, held_out, cache=numbers)
            add(
                cache=cache,
                row="choose",
                cpu_seconds=round(cpu_seconds() - start, 1),
                rope_dim=options["rope_dim"],
            )
        for name in args.recipes:
            start = cpu_seconds()
            new = convert(
                model, params, "decoupled", stats=text_of_fits, recipe=RECIPES[name], **options
            )
            seconds = round(cpu_seconds() - start, 1)
            add(
                cache=cache,
                row=name,
                cpu_seconds=seconds,
                **sizes(new[0]),
                perplexity=perplexity(*new, batches(test, 4)),
            )


if __name__ == "__main__":
    main()
