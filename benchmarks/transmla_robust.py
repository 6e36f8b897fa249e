"""Decoupled conversions over sizes, recipes, dtypes and calibration texts: finite, or one line.

    python -m benchmarks.transmla_robust MODEL DATA [--grid all] [--out transmla_robust.json]

DATA is the folder with text/ and humaneval/. Every case is a conversion of the model and a forward
pass on another text. It passes if all logits are finite, or if the conversion raises a ValueError
of one line. `--grid pairs` takes so few of all cases that every pair of two settings is in one.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from kvjax.transmla import BEST, UNBIASED, calibrate, published, to_decoupled
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


def every_pair(cases: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A few of the cases that have every pair of values of two settings; always the same ones."""

    def pairs(case: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    cases = random.Random(0).sample(cases, len(cases))
    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=local_path)
    parser.add_argument("--grid", choices=("pairs", "all"), default="pairs")
    parser.add_argument("--length", type=int, default=64, help="tokens of a calibration sequence")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--out", type=local_path, default=Path("transmla_robust.json"))
    args = parser.parse_args()
    cases = list(itertools.product(("float32", "bfloat16"), TEXTS, COUNTS, RANKS, ROPES, RECIPES))
    chosen = cases if args.grid == "all" else every_pair(cases)
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    # Cases of one dtype and one text share their calibration.
    groups = itertools.groupby(sorted(chosen), key=lambda case: case[:3])
    for (dtype, text, count), group in groups:
        if time.monotonic() - start > args.seconds:
            break
        model, params = kvjax.load(args.model, dtype=dtype)
        base, words = gqa_layers(model)[0], model.config.vocab_size
        whole = 2 * base.num_kv_heads * base.head_dim
        tokens = token_rows(args.model, args.data, text, words, count, args.length)
        probe = token_rows(args.model, args.data, "prose", words, 2, args.length)[1:]
        stats = calibrate(model, params, [tokens[i : i + 16] for i in range(0, count, 16)])
        for *_, rank, rope, recipe in group:
            if time.monotonic() - start > args.seconds:
                break
            sizes = {
                "kv_rank": max(int(whole * rank), 1),
                "rope_dim": int(whole * rope) // 2 * 2,
            }
            result = outcome(model, params, stats, probe, **sizes, **RECIPES[recipe])
            rows.append(
                {"dtype": dtype, "text": text, "sequences": count, **sizes, "recipe": recipe}
                | {"result": result}
            )
            print(json.dumps(rows[-1]), flush=True)
        jax.clear_caches()
    failed = sum(row["result"].startswith("FAILED") for row in rows)
    about = {**environment("benchmarks.transmla_robust"), "model": Path(args.model).name}
    facts = {"cases": len(cases), "chosen": len(chosen), "run": len(rows), "failed": failed}
    args.out.write_text(json.dumps({**about, **facts, "rows": rows}, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
