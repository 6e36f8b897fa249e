"""Speed of the decode operations against the memory's bandwidth, on whatever device there is.

    python -m pallas_kernels.bench [--json FILE] [--tune]

For each operation, model, batch and context it prints the median time of every implementation that
supports the case. It also prints the bandwidth of reading the live entries, as a share of the
bandwidth of a copy that is timed in turn with them. The baseline is XLA's einsum ("xla"). Dense
caches are also compared with `jax.nn.dot_product_attention` and, where they can run, with jax's
paged attention and tokamax; ragged caches with a dense cache of as many entries ("dense").
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import api
from pallas_kernels.bench.baselines import optional_baselines
from pallas_kernels.bench.cases import GQA, MLA, gqa_case, mla_case, ragged_case
from pallas_kernels.bench.measure import Row, measure, tune, write

TABLES = Path(__file__).parents[1] / "tables"
OPERATIONS = ("gqa_decode", "ragged_gqa_decode", "mla_decode")


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    args = arguments(argv)
    on = api.target()
    if args.tune:
        try:
            found = tune(cases(args), on.platform, args.repeats)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        write(TABLES / f"{on.platform}.json", on.device_kind, found)
        print(json.dumps(found, indent=1))
        return 0
    # Rows are printed as they come, since a run takes minutes.
    absent: dict[str, str] = {}
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows: list[Row] = []
    for case in cases(args):
        others, missing = optional_baselines(case, on.platform)
        absent |= missing
        found, bandwidth = measure(case, others, args.copy_mib * 2**20, args.repeats, clock)
        for row in found:
            print(line(row, bandwidth), flush=True)
        rows += found
    for name, reason in absent.items():
        print(f"without {name}: {reason}")
    if args.json:
        args.json.write_text(json.dumps(result(rows, absent, args, on), indent=1) + "\n")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments; defaults are small if the device is a CPU."""
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
    """Makes the chosen cases one at a time, so that only one has its arrays in memory."""
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


def line(row: Row, bandwidth: float) -> str:
    """A row as a line of text."""
    what = f"{row.operation} {row.budgets} {row.model} {row.dtype} B {row.batch} S {row.context}"
    return (
        f"{what:66} {row.implementation:12} {row.median * 1e6:10.1f} µs  "
        f"{row.of_copy:5.1%} of {bandwidth / 1e9:.0f} GB/s  {row.times_xla:5.2f} × xla"
    )


def result(
    rows: list[Row], absent: dict[str, str], args: argparse.Namespace, on: api.Target
) -> dict[str, Any]:
    """The content of the JSON file."""
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
