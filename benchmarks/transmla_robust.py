"""Decoupled conversions over sizes, recipes, dtypes and calibration texts: finite, or one line.

    python -m benchmarks.transmla_robust MODEL DATA [--grid all] [--out transmla_robust.json]

DATA is the folder with text/ and humaneval/. Every case is a conversion of the model and a forward
pass on another text. It passes if all logits are finite, or if the conversion raises a ValueError
of one line. `--grid pairs` takes so few of all cases that every pair of two settings is in one.
Cases are in a random order, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import os
import random
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.environment import environment
from kvjax.paths import local_path
from kvjax.runs import write_json
from kvjax.transmla import BEST, UNBIASED, Stats, calibrate, published, to_decoupled
from kvjax.transmla.layer import gqa_layers

RECIPES: dict[str, dict[str, Any]] = {
    "best": {"recipe": BEST},
    "closed form": {"recipe": dataclasses.replace(BEST, refit=False)},
    "unbiased": {"recipe": UNBIASED},
    "exportable": {"recipe": BEST, "exportable": True},
    "published": {"recipe": published(4)},
}
TEXTS = ("prose", "code", "one token")
COUNTS = (2, 16, 128)
RANKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of the whole width
ROPES = (0, 1 / 32, 1 / 8, 1 / 4)  # of the whole width


Case = tuple[Any, ...]
"""dtype, text, sequences, rank, rope, recipe."""


def token_rows(model: str, data: Path, text: str, vocabulary: int, count: int, length: int) -> Any:
    """int32 [count, length] token ids; a text that is too short begins again."""
    if text == "one token":
        return np.full((count, length), vocabulary // 3, np.int32)
    if text == "prose":
        with gzip.open(data / "text" / "tinystories.txt.gz", "rt", encoding="utf-8") as file:
            string = file.read(400_000)
    else:
        with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
            string = "\n".join(json.loads(line)["prompt"] for line in file)
    tokenizer: Any = kvjax.load_tokenizer(model)
    ids = np.asarray(tokenizer(string, add_special_tokens=False)["input_ids"], np.int32)
    return np.resize(ids, (count, length))


def outcome(model: Any, params: Any, stats: Any, probe: np.ndarray, **options: Any) -> str:
    """ "finite", the line of a ValueError, or what is wrong."""
    try:
        new_model, new = to_decoupled(model, params, stats, **options)
    except ValueError as error:
        return f"refused: {error}" if "\n" not in str(error) else f"FAILED: {error}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    logits, _ = new_model.apply({"params": new}, jnp.asarray(probe))
    return "finite" if np.isfinite(np.asarray(logits, np.float32)).all() else "FAILED: NaN"


def every_pair(cases: list[Case]) -> list[Case]:
    """A few of the cases that have every pair of values of two settings; always the same ones."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    cases = random.Random(0).sample(cases, len(cases))
    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def in_groups(cases: list[Case]) -> list[Case]:
    """The cases in a random order in which those of one shape follow each other.

    Compiled programs belong to dtype, number of sequences and sizes, whatever text and recipe.
    """
    shapes: dict[Any, list[Case]] = {}
    for case in cases:
        dtype, _, count, rank, rope, _ = case
        shapes.setdefault((dtype, count, rank, rope), []).append(case)
    order = random.Random(1).sample(list(shapes), len(shapes))
    return [case for shape in order for case in shapes[shape]]


class Bench:
    """The model in both dtypes, and its calibrations, each made once."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.models = functools.cache(lambda dtype: kvjax.load(args.model, dtype=dtype))
        self.stats = functools.cache(self._calibrate)

    def _calibrate(self, dtype: str, text: str, count: int) -> Stats:
        model, params = self.models(dtype)
        tokens = self._tokens(dtype, text, count)
        return calibrate(model, params, [tokens[i : i + 16] for i in range(0, count, 16)])

    def _tokens(self, dtype: str, text: str, count: int) -> Any:
        words = self.models(dtype)[0].config.vocab_size
        return token_rows(self.args.model, self.args.data, text, words, count, self.args.length)

    def row(self, case: Case) -> dict[str, Any]:
        """A case and its outcome."""
        dtype, text, count, rank, rope, recipe = case
        model, params = self.models(dtype)
        base = gqa_layers(model)[0]
        whole = 2 * base.num_kv_heads * base.head_dim
        sizes = {"kv_rank": max(int(whole * rank), 1), "rope_dim": int(whole * rope) // 2 * 2}
        stats, probe = self.stats(dtype, text, count), self._tokens(dtype, "prose", 2)[1:]
        result = outcome(model, params, stats, probe, **sizes, **RECIPES[recipe])
        return {**named(case), **sizes, "result": result}


def named(case: Case) -> dict[str, Any]:
    """The settings of a case by their names."""
    names = ("dtype", "text", "sequences", "rank", "rope", "recipe")
    return dict(zip(names, case, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=local_path)
    parser.add_argument("--grid", choices=("pairs", "all"), default="pairs")
    parser.add_argument("--length", type=int, default=64, help="tokens of a calibration sequence")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="sequences")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--out", type=local_path, default=Path("transmla_robust.json"))
    args = parser.parse_args()
    dtypes = ("float32", "bfloat16")
    cases = list(itertools.product(dtypes, TEXTS, args.counts, RANKS, ROPES, RECIPES))
    chosen = in_groups(cases if args.grid == "all" else every_pair(cases))
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    bench, start, shape = Bench(args), time.monotonic(), None
    for case in chosen:
        if time.monotonic() - start > args.seconds:
            break
        if any(named(case).items() <= row.items() for row in rows):
            continue
        if shape not in (None, (case[0], *case[2:5])):
            jax.clear_caches()
        shape = case[0], *case[2:5]
        rows.append(bench.row(case))
        print(json.dumps(rows[-1]), flush=True)
        results = [row["result"].partition(":")[0] for row in rows]
        counts = {kind: results.count(kind) for kind in ("finite", "refused", "FAILED")}
        about = {**environment("benchmarks.transmla_robust"), "model": Path(args.model).name}
        facts = {"cases": len(cases), "chosen": len(chosen), "run": len(rows), **counts}
        write_json(args.out, {**about, **facts, "rows": rows})
    print(json.dumps({"run": len(rows), "of": len(chosen)}))


if __name__ == "__main__":
    main()
