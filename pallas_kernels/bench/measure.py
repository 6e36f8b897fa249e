"""Times of the implementations of a case, and the fastest block sizes of a kernel."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import api, tables
from pallas_kernels.bench.baselines import baselines
from pallas_kernels.bench.cases import Case


@dataclass
class Row:
    """The times of one implementation of one case.

    Attributes:
        operation, model, batch, context, dtype, budgets, live_bytes: as in `Case`.
        implementation: its name, or the name of a baseline.
        median: seconds of a call, the median of `seconds`.
        of_copy: bytes of live entries a second, over bytes a second of a copy.
        flops_per_s: floating point operations a second of the products with the entries.
        times_xla: time of the "xla" implementation over this time.
        seconds: seconds of a call, measured several times.
    """

    operation: str
    model: str
    batch: int
    context: int
    dtype: str
    budgets: str
    implementation: str
    median: float
    live_bytes: int
    of_copy: float
    flops_per_s: float
    times_xla: float
    seconds: list[float]


def measure(
    case: Case,
    others: dict[str, Callable[[], Any]],
    copy_bytes: int,
    repeats: int,
    clock: Callable[[], float],
) -> tuple[list[Row], float]:
    """Times all implementations of a case, its baselines, `others` and a copy, in turns.

    Args:
        others: more functions that do the case's work, by name.
        copy_bytes: size of the array that is copied.
        repeats: number of turns.
        clock: returns seconds.

    Returns:
        A row for each function except the copy, and the copy's bandwidth in bytes a second.
    """
    copy, copied = copier(copy_bytes)
    runs = {**implementations(case), **baselines(case), **others}
    seconds = in_turns({"copy": copy, **runs}, repeats, clock)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bandwidth = copied / medians["copy"]
    rows = [
        Row(
            case.operation,
            case.model,
            case.batch,
            case.context,
            case.dtype,
            case.budgets,
            name,
            medians[name],
            case.live_bytes,
            case.live_bytes / medians[name] / bandwidth,
            case.flops / medians[name],
            medians["xla"] / medians[name],
            seconds[name],
        )
        for name in runs
    ]
    return rows, bandwidth


def implementations(case: Case) -> dict[str, Callable[[], Any]]:
    """The implementations that can serve the case on this device: "xla" and perhaps a kernel."""

    def compiled(name: str) -> Callable[[], Any]:
        run = jax.jit(lambda *arguments: case.run(*arguments, implementation=name))
        # Tracing raises NotImplementedError if the implementation cannot serve.
        jax.eval_shape(run, *case.arguments)
        return lambda: run(*case.arguments)

    found = {"xla": compiled("xla")}
    for name in api.PLATFORMS:
        try:
            found[name] = compiled(name)
        except NotImplementedError:
            continue
    return found


SHORTEST = 0.02
"""Seconds that a measurement lasts at least; short calls are repeated within it."""


def in_turns(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a call of each function, measured `repeats` times.

    The functions take turns, so that other load on the machine affects all of them equally.
    """
    calls = {name: _calls_needed(run) for name, run in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, run in functions.items():
            # Not timed: the first call pays for what the function before left in caches.
            jax.block_until_ready(run())
            start = clock()
            for _ in range(calls[name] - 1):
                run()
            jax.block_until_ready(run())
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def _calls_needed(run: Callable[[], Any]) -> int:
    """Calls that last at least `SHORTEST` seconds."""
    jax.block_until_ready(run())  # compiles
    start = time.perf_counter()
    jax.block_until_ready(run())
    return max(1, int(SHORTEST / max(time.perf_counter() - start, 1e-6)))


def copier(bytes_: int) -> tuple[Callable[[], jax.Array], int]:
    """A copy on the device, and the bytes that it moves, read and written."""
    source = jnp.zeros((bytes_ // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)  # XLA would drop a mere copy
    return (lambda: copy(source)), 2 * source.nbytes


CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "tpu": {"block": (256, 512, 1024, 2048)},
    "gpu": {"stages": (2, 3, 4, 6, 8)},
}
"""The size that is tuned for each platform, and the values that are tried."""


def tune(
    cases: Iterable[Case], platform: str, repeats: int, seconds: Callable = in_turns
) -> dict[str, dict[str, int]]:
    """The fastest sizes for each operation: the smallest sum of median times over its cases.

    A size must compile for every case of its operation. Sizes that do not are left out, and a line
    on stderr says so.

    Args:
        seconds: `in_turns` or a replacement.

    Returns:
        {operation: {size: value}}.

    Raises:
        ValueError: the platform has no kernels, or no size compiles for an operation.
    """
    if platform not in CANDIDATES:
        raise ValueError(f"nothing to tune on a {platform}")
    ((name, values),) = CANDIDATES[platform].items()
    totals: dict[str, dict[int, float]] = {}
    for case in cases:
        sums = totals.setdefault(case.operation, dict.fromkeys(values, 0.0))
        runs = {}
        # Compile every size that is still in the race, then time them together.
        for value in list(sums):
            try:
                runs[str(value)] = _runner(case, platform, {name: value})
            except Exception as error:  # limits, Mosaic and XLA raise different types
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
    implementation = next(k for k, v in api.PLATFORMS.items() if v == platform)

    def run(*arguments):
        return case.run(*arguments, implementation=implementation)

    with tables.using(**sizes):
        compiled = jax.jit(run).lower(*case.arguments).compile()
    return lambda: compiled(*case.arguments)


def write(path: Path, kind: str, found: dict[str, dict[str, int]]) -> None:
    """Adds the sizes found for a device kind to the table in a file; other sizes stay."""
    table = json.loads(path.read_text())
    entry = table.setdefault(kind, {})
    for operation, sizes in found.items():
        entry[operation] = entry.get(operation, {}) | sizes
    path.write_text(json.dumps(table, indent=1) + "\n")
