"""Conversions by kvjax and by the published TransMLA code: CPU seconds and perplexity, in one run.

    python -m benchmarks.peers.transmla_compared MODEL TEXT CODE [--calibration 128] [--cache 0.5]

Both calibrate on the same sequences, in float32, and are tested on the same ones (those of
`benchmarks.transmla_real`). CODE is the folder transmla/ of the authors' repository. CPU seconds
are those of calibration and conversion, compilations among them, without reading the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before NumPy is imported: threads of BLAS that wait for each other would count as CPU time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import kvjax
from benchmarks.environment import environment
from benchmarks.transmla_real import batches, cpu_seconds, parser_of, sequences, sizes, token_list
from kvjax.paths import local_path
from kvjax.tasks import perplexity
from kvjax.transmla import BEST, calibrate, convert

ROPE_DIM = 64
"""Rotary numbers of the published conversion: one component a frequency, of heads of 64."""


def main() -> None:
    parser = parser_of(__doc__, "transmla_compared.json")
    parser.add_argument("code", type=local_path)
    parser.add_argument("--cache", type=float, default=0.5)
    parser.add_argument("--venv", type=local_path, default=Path(".venv-transmla"))
    args = parser.parse_args()
    model, params = kvjax.load(args.model, dtype="float32")
    ids = token_list(args.model, args.text)
    calibration = sequences(ids, 0, args.calibration, 256)
    test = batches(sequences(ids, len(ids) // 2, args.test, 512), 4)
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        about = {
            **environment("benchmarks.peers.transmla_compared"),
            "model": Path(args.model).name,
        }
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

    start = cpu_seconds()
    stats = calibrate(model, params, batches(calibration, 8))
    calibrated = cpu_seconds() - start
    add(row="calibrate", cpu_seconds=round(calibrated, 1))
    for name, recipe in (
        ("closed form", dataclasses.replace(BEST, refit=False)),
        ("default", BEST),
    ):
        start = cpu_seconds()
        new = convert(model, params, "decoupled", stats=stats, cache=args.cache, recipe=recipe)
        seconds = calibrated + cpu_seconds() - start
        found = {**sizes(new[0]), "perplexity": perplexity(*new, test)}
        add(row=name, cpu_seconds=round(seconds, 1), **found)
    numbers = rows[-1]["kv_rank"] + rows[-1]["rope_dim"]
    del new, params
    tokens = {
        "calibration": calibration.tolist(),
        "test": [row for b in test for row in b.tolist()],
    }
    theirs = published(args, tokens, numbers - ROPE_DIM)
    add(row="published code", **theirs)
    for row in rows[1:-1]:
        row["ratio"] = round(row["cpu_seconds"] / theirs["cpu_seconds"], 2)
    add(row="ratios", **{row["row"]: row["ratio"] for row in rows[1:-1]})


def published(args: argparse.Namespace, tokens: dict[str, Any], kv_rank: int) -> dict[str, Any]:
    """The row of the published code."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = Path(folder) / "tokens.json", Path(folder) / "out.json"
        inputs.write_text(json.dumps(tokens))
        call = [sys.executable, "-m", "benchmarks.peers", "transmla", inputs, args.model]
        call += ["--out", out, "--venv", args.venv, "--code", args.code]
        call += ["--kv-rank", kv_rank, "--rope-dim", ROPE_DIM]
        subprocess.run([str(part) for part in call], check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
