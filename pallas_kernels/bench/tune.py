"""Block sizes measured: the fastest of a few for each operation, into the device kind's table."""

import json
import statistics
import sys
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

    Sizes that do not compile for all cases of an operation are left out, and said.

    Raises:
        ValueError: a platform without kernels, or an operation for which no size compiles.
    """
    if platform not in CANDIDATES:
        raise ValueError(f"nothing to tune on a {platform}")
    ((name, values),) = CANDIDATES[platform].items()
    totals: dict[str, dict[int, float]] = {}
    for case in cases:
        sums = totals.setdefault(case.operation, dict.fromkeys(values, 0.0))
        runs = {}
        for value in list(sums):
            try:
                runs[str(value)] = _runner(case, platform, {name: value})
            except Exception as error:  # limits, the kernel's compiler and XLA's each raise others
                del sums[value]
                reason = (str(error) or type(error).__name__).splitlines()[0]
                print(f"{case.operation} without {name}={value}: {reason}", file=sys.stderr)
        if not sums:
            raise ValueError(f"{case.operation} compiles with no {name} of {values}")
        for value, times in seconds(runs, repeats, time.perf_counter).items():
            sums[int(value)] += statistics.median(times)
    return {
        operation: {name: min(sums, key=lambda value: sums[value])}
        for operation, sums in sorted(totals.items())
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
