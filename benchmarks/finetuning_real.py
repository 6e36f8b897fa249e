"""GQA against MLA on a real checkpoint: `python -m train compare` on GSM8K and MBPP.

    python -m benchmarks.finetuning_real MODEL DATA --out FOLDER

Four arms start as the same function, with the same cache: GQA that trains W_K and W_V; GQA that
also trains as many W_Q and W_O as make it as large as the conversion; `equal_cache` (svd_global)
that trains its K/V layers; and the same that trains its up-projections only, which are as many
parameters as GQA trains. The data are GSM8K's training rows in MetaMath's format and MBPP's
training problems (601 to 974), in equal parts; the held-out loss is that of rows of GSM8K's test
set and of MBPP's validation problems (511 to 600). An interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.environment import environment
from kvjax.paths import local_path
from kvjax.runs import write_json, write_whole
from kvjax.text_files import read_bytes, read_object
from train.compare.command import compare

ARMS = "gqa", "gqa_matched", "mla_svd_global", "mla_svd_global_up"
MBPP = {"train": range(601, 975), "held_out": range(511, 601)}
"""The problems that MBPP's paper (Austin et al. 2021) trains on, and those that it validates on."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=local_path, help="folder with gsm8k/ and mbpp/")
    parser.add_argument("--out", type=local_path, required=True, help="folder of the comparison")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--length", type=int, default=256, help="tokens of a packed row")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of each source")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    folder = args.out / "rows"
    for split, ids in MBPP.items():
        rows = map(json.loads, read_bytes(args.data / "mbpp" / "mbpp.jsonl.gz").splitlines())
        kept = [row for row in rows if row["task_id"] in ids]
        write_whole(folder / f"mbpp-{split}.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
    config = {
        "model": args.model,
        "data": [
            f"gsm8k:{args.data / 'gsm8k' / 'train.jsonl.gz'}",
            f"mbpp:{folder / 'mbpp-train.jsonl'}",
        ],
        "held_out": [
            f"gsm8k:{args.data / 'gsm8k' / 'test.jsonl.gz'}",
            f"mbpp:{folder / 'mbpp-held_out.jsonl'}",
        ],
        "arms": list(ARMS),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "sequence_length": args.length,
        "rates": args.rates,
        "paper_rate": None,
        "seeds": args.seeds,
        "eval_every": max(1, args.steps // 4),
        "eval_rows": args.rows,
    }
    # JSON is YAML.
    write_whole(args.out / "compare.yaml", json.dumps(config, indent=1) + "\n")
    compare(args.out / "runs", args.out / "compare.yaml", args.workers)
    names = ("data", "held_out")
    settings = config | {name: [Path(text).name for text in config[name]] for name in names}
    about = {**environment("benchmarks.finetuning_real"), "settings": settings}
    result = read_object(args.out / "runs" / "results.json")
    write_json(args.out / "finetuning_real.json", {**about, **result})


if __name__ == "__main__":
    main()
