"""Processor seconds that jax spends on programs before the first token, and how many it compiles.

    python -m benchmarks.cold_start [--layers 6 30] [--models llama decoupled] [--policies full …]

The model is a random llama of SmolLM2-135M's shape in float32, or its decoupled conversion. Each
policy has a process of its own, so that its first call finds nothing: no program in memory, an
empty persistent cache. More calls follow in the same process, each with one thing changed. Then a
second process makes the first call again, with the persistent cache that the first process filled.
Times are processor seconds of all threads, so that they hold on a busy machine.

Each row is written when it is measured, and a run on the same commit keeps the rows that it finds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from kvjax.paths import local_path

RESULTS = Path("benchmarks/results/cold_start.json")
POLICIES = ("full", "snapkv:kv_size=64", "headkv:kv_size=64", "adasnapkv:kv_size=64")


def main() -> None:
    args = arguments()
    found = environment("benchmarks.cold_start")
    rows = kept_rows(args.out, found["commit"], args.only_first)
    with tempfile.TemporaryDirectory() as directory:
        for layers, kind, policy in itertools.product(args.layers, args.models, args.policies):
            name = f"{kind}, {layers} layers, {policy}"
            if name not in rows:
                cell = {"kind": kind, "layers": layers, "policy": policy}
                rows[name] = cell | measure(Path(directory), cell, args.only_first)
                result = {"what": (__doc__ or "").split("\n")[0], **found}
                args.out.write_text(
                    json.dumps(result | {"rows": list(rows.values())}, indent=1) + "\n"
                )
            print("\n".join(table(rows[name])), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", type=int, default=[6, 30])
    parser.add_argument("--models", nargs="+", default=["llama", "decoupled"])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--only-first", action="store_true", help="leave out the changed calls")
    parser.add_argument("--out", type=local_path, default=RESULTS)
    return parser.parse_args()


def kept_rows(path: Path, commit: str, only_first: bool) -> dict[str, Any]:
    """Rows of an earlier run on the same commit, by name, unless changed calls are missing."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    rows = old["rows"] if old.get("commit") == commit else []
    return {
        f"{row['kind']}, {row['layers']} layers, {row['policy']}": row
        for row in rows
        if only_first or len(row["empty_cache"]["calls"]) > 2
    }


def measure(directory: Path, cell: dict[str, Any], only_first: bool) -> dict[str, Any]:
    """Calls in a process that finds nothing, and the first one again in a process after it."""
    model = directory / f"{cell['kind']}-{cell['layers']}"
    if not model.is_dir():
        in_process("write", cell | {"model": str(model)})
    with tempfile.TemporaryDirectory(dir=directory) as cache:
        calls = {"model": str(model), "policy": cell["policy"]}
        first = in_process("calls", calls | {"only_first": only_first}, cache)
        second = in_process("calls", calls | {"only_first": True}, cache)
        return {"empty_cache": first, "filled_cache": second}


def in_process(task: str, settings: dict[str, Any], cache: str | None = None) -> Any:
    """What `benchmarks.cold_start_process` finds, with a folder for jax's persistent cache."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": str(cache is not None).lower(),
        "JAX_COMPILATION_CACHE_DIR": cache or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cold_start_process", task, json.dumps(settings)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def table(row: dict[str, Any]) -> Iterator[str]:
    """The row's calls as lines of a Markdown table."""
    yield f"| **{row['kind']}, {row['layers']} layers, {row['policy']}** |" + " |" * 7
    for cache in ("empty_cache", "filled_cache"):
        for call in row[cache]["calls"]:
            what = call["call"] + (", another process" if cache == "filled_cache" else "")
            stages = " | ".join(f"{call[f'{s}_s']:.1f}" for s in ("trace", "lower", "compile"))
            yield (
                f"| {what} | {call['cpu_s']:.1f} | {stages} | {call['read_s']:.1f} "
                f"| {call['run_s']:.1f} | {call['compiled']} | {call['read']} |"
            )


if __name__ == "__main__":
    main()
