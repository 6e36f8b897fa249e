"""Block sizes measured: the fastest of a few for each operation, into the device kind's table."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import dispatch, tuning
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.timing import in_turns

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "tpu": {"block": (256, 512, 1024, 2048)},
    "gpu": {"stages": (2, 3, 4, 6, 8)},
}


def tune(
    cases: Iterable[Case], platform: str, repeats: int, seconds: Callable = in_turns
) -> dict[str, dict[str, int]]:
    """{operation: sizes} that have the smallest sum of median times over its cases.

    Raises:
        ValueError: a platform without kernels.
    """
    if platform not in CANDIDATES:
        raise ValueError(f"nothing to tune on a {platform}")
    ((name, values),) = CANDIDATES[platform].items()
    totals: dict[tuple[str, int], float] = {}
    for case in cases:
        runs = {str(value): _runner(case, platform, {name: value}) for value in values}
        for value, times in seconds(runs, repeats, time.perf_counter).items():
            key = case.operation, int(value)
            totals[key] = totals.get(key, 0.0) + statistics.median(times)
    operations = {operation for operation, _ in totals}
    return {
        operation: {name: min(values, key=lambda value: totals[operation, value])}
        for operation in sorted(operations)
    }


def _runner(case: Case, platform: str, sizes: dict[str, int]) -> Callable[[], Any]:
    """The case's kernel with these sizes, compiled."""
    implementation = next(k for k, v in dispatch.PLATFORMS.items() if v == platform)

    def run(*arguments):
        return case.run(*arguments, implementation=implementation)

    with tuning.using(**sizes):
        compiled = jax.jit(run).lower(*case.arguments).compile()
    return lambda: compiled(*case.arguments)


def write(path: Path, kind: str, found: dict[str, dict[str, int]]) -> None:
    """Adds what was found for a device kind to a table."""
    table = json.loads(path.read_text())
    entry = table.setdefault(kind, {})
    for operation, sizes in found.items():
        entry[operation] = entry.get(operation, {}) | sizes
    path.write_text(json.dumps(table, indent=1) + "\n")
