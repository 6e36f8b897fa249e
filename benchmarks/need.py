"""Budgets from measured need beside those from importance, and beside equal budgets.

    python -m benchmarks.need [MODEL] [--scores FILE] [--samples 64] [--length 1024]

Curves are measured on 16 needles and 16 two-hop questions of at most 768 tokens (seed 1). They are
judged on other prompts of both kinds (seed 7): the share of answers with every token right, from
caches of equal KV sizes. Both forms of headkv choose the tokens of a head with spans.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import kvjax
from benchmarks.environment import environment
from kvjax import policies
from kvjax.headkv.examples import Grid, make_examples
from kvjax.paths import local_path
from kvjax.policies.named import resolve_each
from kvjax.scoring import compare

KINDS = {"needle": "retrieval", "two-hop": "retrieval_reasoning"}
KV_SIZES = (10, 12, 16, 24, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="builtin:needle")
    parser.add_argument("--scores", default="", help="head scores; default: the model's own")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/need.json"))
    args = parser.parse_args()
    model, params = kvjax.load(args.model, dtype="float32")
    tokenizer, start = kvjax.load_tokenizer(args.model), time.process_time()
    shown = [e for kind in KINDS.values() for e in make_examples(tokenizer, Grid(kind, 16, 768, 1))]
    curves = kvjax.headkv.measure_need(model, params, shown)
    seconds, rows = time.process_time() - start, []
    file = args.out.with_suffix(".curves.json")
    curves.save(file)
    made = {
        "snapkv": lambda size: policies.snapkv(kv_size=size),
        "headkv, importance": lambda size: policies.headkv(kv_size=size, scores=args.scores),
        "headkv, need": lambda size: policies.headkv(kv_size=size, need=str(file)),
    }
    names = [(name, size) for name in made for size in KV_SIZES]
    asked = resolve_each([made[name](size) for name, size in names], model.config)
    every: dict[str, Any] = {
        f"{name} {size}": each for (name, size), each in zip(names, asked, strict=True)
    }
    for kind, estimator in KINDS.items():
        examples = make_examples(tokenizer, Grid(estimator, args.samples, args.length, 7))
        right = compare(model, params, examples, every, batch_size=16).right
        rows += [{"kind": kind, "policy": n, "right": float(r.mean())} for n, r in right.items()]
        print(kind, {name: round(float(found.mean()), 3) for name, found in right.items()})
    result = {"model": Path(args.model).name, "samples": args.samples, "length": args.length}
    result |= {"curves": curves.meta, "cpu_seconds_of_curves": round(seconds, 1), "rows": rows}
    found = environment("benchmarks.need") | result
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
