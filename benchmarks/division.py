"""How the cache of a decoupled conversion is divided: what is chosen, and what other sizes give.

    python -m benchmarks.division MODEL TEXT [--out division.json] [--stats FILE]

For each share of the cache: the error that the moments predict for each rope_dim
(`kvjax.transmla.division`), the perplexity of the closed form with it, and with other weights of
the values' errors at the chosen one. MODEL is calibrated on the first sequences of TEXT, and judged
on those from three quarters of it. Repeat the command to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import kvjax
from benchmarks.environment import environment
from benchmarks.transmla_real import batches, sequences, token_list
from kvjax.paths import local_path
from kvjax.runs import write_json
from kvjax.tasks import perplexity
from kvjax.transmla import BEST, calibrate, convert
from kvjax.transmla.closed_form import VALUES, aware
from kvjax.transmla.division import attention_layers, mean_errors
from kvjax.transmla.layer import gqa_layers
from kvjax.transmla.sizes import rope_dims_to_choose

CLOSED = dataclasses.replace(BEST, refit=False)
WEIGHTS = (1.0, 2.0, 4.0, 8.0)


def weighted(weight: float) -> Any:
    """The metric of the joint PCA with another weight of the values' errors."""

    def metric(moments: Any) -> np.ndarray:
        root, n = aware(moments), len(moments.key_metric)
        root[n:, n:] *= (weight / VALUES) ** 0.5
        return root

    return metric


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=local_path)
    parser.add_argument("--out", type=local_path, default=Path("division.json"))
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument("--test", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--caches", type=float, nargs="+", default=[0.75, 0.5, 0.28125])
    parser.add_argument("--stats", type=local_path, help="file that keeps the calibration")
    args = parser.parse_args()
    model, params = kvjax.load(args.model, dtype="float32")
    ids = token_list(args.model, args.text)
    text = sequences(ids, 0, args.calibration, args.length)
    test = batches(sequences(ids, len(ids) * 3 // 4, args.test, args.length), 4)
    stats = calibrate(model, params, batches(text, 8), resume=args.stats)
    rows: list[dict[str, Any]] = (
        json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    )

    def add(make: Any, **row: Any) -> None:
        if any(all(old.get(k) == v for k, v in row.items()) for old in rows):
            return
        judged, weights = make()
        rows.append({**row, "perplexity": round(perplexity(judged, weights, test), 3)})
        print(json.dumps(rows[-1]), flush=True)
        about = environment("benchmarks.division")
        write_json(args.out, {**about, "model": Path(args.model).name, "rows": rows})

    add(lambda: (model, params), cache=1.0)
    bases = gqa_layers(model)
    for cache in args.caches:
        numbers, choice = rope_dims_to_choose(bases, cache, None, None, False)
        layers = attention_layers(params, stats)
        errors = mean_errors(bases, layers, numbers, choice, lambda _: CLOSED)
        chosen = choice[int(errors.argmin())]

        def converted(width: int, recipe: Any, numbers: int = numbers) -> Any:
            sizes = {"kv_rank": numbers - width, "rope_dim": width}
            return convert(model, params, "decoupled", stats=stats, recipe=recipe, **sizes)

        for width, error in zip(choice, errors.round(4).tolist(), strict=True):
            facts = {"rope_dim": width, "predicted": error, "chosen": width == chosen}
            add(lambda width=width: converted(width, CLOSED), cache=cache, **facts)
        for weight in WEIGHTS:
            recipe = dataclasses.replace(CLOSED, metric=weighted(weight))
            facts = {"rope_dim": chosen, "weight": weight}
            add(lambda r=recipe, w=chosen: converted(w, r), cache=cache, **facts)


if __name__ == "__main__":
    main()
