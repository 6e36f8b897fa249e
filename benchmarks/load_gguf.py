"""Time and memory of loading a GGUF file, here and in transformers.

    python -m benchmarks.load_gguf FILE ... --out benchmarks/results/load_gguf.json

Every row is a process of its own, in which the libraries are imported before anything is counted.
Memory is the process's own (RssAnon), sampled every 10 ms: pages of the mapped file are not in it.
transformers needs torch and accelerate. The rows of one file and dtype were measured one after the
other, so their ratios hold on a machine with other work too; seconds alone do not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.environment import environment

DTYPES = ("float32", "bfloat16")


def by_kvjax(path: Path) -> Callable[[str], int]:
    """Imports kvjax → a function that loads the file in a dtype and returns the weights' bytes."""
    import gguf  # noqa: F401
    import jax

    import kvjax

    jax.devices()

    def load(dtype: str) -> int:
        _, params = kvjax.load(path, dtype=dtype)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(params)))

    return load


def by_transformers(path: Path) -> Callable[[str], int]:
    """As `by_kvjax`, with transformers' own reader."""
    import accelerate  # noqa: F401
    import gguf  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def load(dtype: str) -> int:
        settings = {"gguf_file": path.name, "dtype": getattr(torch, dtype)}
        model = AutoModelForCausalLM.from_pretrained(path.parent, **settings)
        return sum(p.numel() * p.element_size() for p in model.parameters())

    return load


READERS = {"kvjax": by_kvjax, "transformers": by_transformers}


def own_memory() -> int:
    """Bytes of memory that belong to this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def measured(reader: str, path: Path, dtype: str) -> dict[str, Any]:
    """One row, measured in this process."""
    load, peak, done = READERS[reader](path), 0, threading.Event()
    before = own_memory()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, wall = time.process_time(), time.perf_counter()
    size = load(dtype)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    done.set()
    watcher.join()
    return {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "reader": reader,
        "dtype": dtype,
        "weights_bytes": size,
        "peak_bytes": peak - before,
        "peak_over_weights": round((peak - before) / size, 3),
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for path in arguments.files:
        for dtype in DTYPES:
            for reader in arguments.readers:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rows.append(pool.submit(measured, reader, path.resolve(), dtype).result())
                print(json.dumps(rows[-1]), flush=True)
    about = environment("benchmarks.load_gguf", ("jax", "transformers", "gguf", "torch"))
    text = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
