"""Speed of the decode operations against the memory's bandwidth, on whatever device there is.

    python -m pallas_kernels.bench [--json FILE] [--tune]

For each operation, model, batch and context: the median time of every implementation that serves,
the bytes of the live entries, and what part of the bandwidth of a copy on the device, measured in
the same turns, reading them alone would take. Baselines: XLA's einsum ("xla"); for dense caches
`jax.nn.dot_product_attention` and, where they can run, jax's paged attention and tokamax; for
ragged ones as many entries in a dense cache ("dense").
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import dispatch
from pallas_kernels.bench.baselines import baselines
from pallas_kernels.bench.cases import Case, gqa_case, mla_case, ragged_case
from pallas_kernels.bench.optional import optional_baselines
from pallas_kernels.bench.shapes import GQA, MLA
from pallas_kernels.bench.timing import copier, in_turns
from pallas_kernels.bench.tune import tune, write

TABLES = Path(__file__).parents[1] / "tables"
OPERATIONS = ("gqa_decode", "ragged_gqa_decode", "mla_decode")


@dataclass
class Row:
    """One implementation of one case.

    Attributes:
        seconds: of single calls; their median is what the other numbers come from.
        of_copy: bytes of live entries a second over those that a copy moves, 0 … 1.
        flops_per_s: of the products with the entries.
        times_xla: the "xla" implementation's time over this one's.
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


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    args = arguments(argv)
    on = dispatch.target()
    if args.tune:
        try:
            found = tune(cases(args), on.platform, args.repeats)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        write(TABLES / f"{on.platform}.json", on.device_kind, found)
        print(json.dumps(found, indent=1))
        return 0
    absent: dict[str, str] = {}
    rows = [row for case in cases(args) for row in measure(case, args, on.platform, absent)]
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    if args.json:
        args.json.write_text(json.dumps(result(rows, absent, args, on), indent=1) + "\n")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Small sizes by default where the device is a CPU."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    cpu = jax.default_backend() == "cpu"
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--models", nargs="+", default=[*GQA, *MLA], choices=[*GQA, *MLA])
    parser.add_argument("--batches", nargs="+", type=int, default=[1] if cpu else [8, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024] if cpu else [1024, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--copy-mib", type=int, default=64 if cpu else 1024)
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for busy machines")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", action="store_true", help="writes block sizes for this device")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace):
    """One after the other, so that the arrays of one are alive at a time."""
    for dtype in args.dtypes:
        for batch in args.batches:
            for context in args.contexts:
                for model in args.models:
                    size = model, batch, context, dtype
                    if model in MLA and "mla_decode" in args.operations:
                        yield mla_case(*size)
                    if model in GQA and "gqa_decode" in args.operations:
                        yield gqa_case(*size)
                    if model in GQA and "ragged_gqa_decode" in args.operations:
                        yield from (ragged_case(*size, kind) for kind in ("uniform", "skewed"))


def measure(
    case: Case, args: argparse.Namespace, platform: str, absent: dict[str, str]
) -> list[Row]:
    """All implementations of a case and the copy, in turns; what is missing goes to `absent`."""
    copy, copied = copier(args.copy_mib * 2**20)
    others, missing = optional_baselines(case, platform)
    absent |= missing
    runs = {**implementations(case), **baselines(case), **others}
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = in_turns({"copy": copy, **runs}, args.repeats, clock)
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
    for row in rows:
        print(line(row, bandwidth), flush=True)
    return rows


def implementations(case: Case) -> dict[str, Callable[[], Any]]:
    """Those that serve the case here; "xla" always does."""

    def compiled(name: str) -> Callable[[], Any]:
        run = jax.jit(lambda *arguments: case.run(*arguments, implementation=name))
        jax.eval_shape(run, *case.arguments)
        return lambda: run(*case.arguments)

    found = {"xla": compiled("xla")}
    for name in dispatch.PLATFORMS:
        try:
            found[name] = compiled(name)
        except NotImplementedError:
            continue
    return found


def line(row: Row, bandwidth: float) -> str:
    """A row for people."""
    what = f"{row.operation} {row.budgets} {row.model} {row.dtype} B {row.batch} S {row.context}"
    return (
        f"{what:66} {row.implementation:12} {row.median * 1e6:10.1f} µs  "
        f"{row.of_copy:5.1%} of {bandwidth / 1e9:.0f} GB/s  {row.times_xla:5.2f} × xla"
    )


def result(
    rows: list[Row], absent: dict[str, str], args: argparse.Namespace, on: dispatch.Target
) -> dict[str, Any]:
    """What the file holds."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": on.device_kind,
        "platform": on.platform,
        "jax": jax.__version__,
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "absent": absent,
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
