"""What fits where: `kvjax plan` of four models on TPUs and GPUs, as one page.

    python -m benchmarks.capacity [--context 32768] [--topologies v5e:4x4 v5p:2x2x4 v6e:4x4]
    python -m benchmarks.capacity --topologies h200:8

A plan takes one to three processor minutes. With --check it also compiles the whole step, which
takes several times as long; --models and --checked name the models of a run, and those to check.

Needs libtpu (pip install "jax[tpu]") and no TPU; for GPUs, jax 0.12 with its CUDA plugin and no
GPU. Every plan is a process of its own; finished ones are kept in the result file and not made
again. Writes benchmarks/results/capacity.json and the tables of docs/capacity.md, between its two
markers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

MODELS = ("llama-3-8b", "qwen2.5-7b", "qwen2.5-72b", "llama-3-70b")
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
SHAPES, PAGE = Path("benchmarks/shapes"), Path("docs/capacity.md")
MARKERS = ("<!-- made by benchmarks.capacity -->", "<!-- end -->")


def main() -> None:
    from kvjax.paths import local_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--checked", nargs="*", default=MODELS[:1], choices=MODELS)
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/capacity.json"))
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {"plans": {}}
    for model in args.models:
        for topology in args.topologies:
            name = f"{model} {topology} {args.context}"
            if name not in found["plans"]:
                report = plan(model, topology, args.context, model in args.checked)
                found["plans"][name] = report | {"environment": environment("benchmarks.capacity")}
                args.out.write_text(json.dumps(found, indent=1) + "\n")
                print(name, report["seconds"], report["check"], flush=True)
    write_page(found["plans"])


def plan(model: str, topology: str, context: int, check: bool) -> dict[str, Any]:
    """The report of `kvjax plan`, and the seconds it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "kvjax.cli", "plan", str(SHAPES / f"{model}.json")]
        command += ["--topology", topology, "--context", str(context)]
        command += ["--check"] * check
        quiet = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        subprocess.run(
            [*command, "--json", str(out)],
            check=True,
            env=os.environ | quiet,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        report = json.loads(out.read_text())
    return {**report, "seconds": round(time.monotonic() - start, 1)}


def write_page(plans: dict[str, Any]) -> None:
    """Puts the tables between the page's markers."""
    before, rest = PAGE.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    ordered = sorted(plans, key=lambda name: MODELS.index(name.split()[0]))
    text = "\n\n".join(table(name, plans[name]) for name in ordered)
    PAGE.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}")


def table(name: str, report: dict[str, Any]) -> str:
    """One model on one topology."""
    model, *_ = name.split()
    check = report["check"]
    mesh = ", ".join(part for part in report["mesh"].split(", ") if not part.endswith("=1"))
    lines = [
        f"### {model} on {report['topology']}, {mesh}",
        "",
        "| cache | weights | caches | decode | prefill | a layer's collectives | besides "
        "| most sequences | longest context |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    full = report["rows"][0]["cache"]
    for row in report["rows"]:
        sizes = (row[key] / 2**30 for key in ("weights", "cache"))
        decode, prefill = (row[key] for key in ("decode_temporaries", "prefill"))
        cells = [
            row["variant"],
            *(f"{size:.2f}" for size in sizes),
            f"{decode / 2**20:.0f} ({decode / full:.1%})",
            f"{prefill / 2**20:.0f}",
            *(counts(row[key]) for key in ("collectives_layer", "collectives_outside")),
            *(factor(row, key) for key in ("batch", "context")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    said = notes(report)
    if check:
        said.insert(
            0, f"A step of all layers compiled: {check['relative_error']:.2%} from the plan."
        )
    lines += ["", " ".join(said)] if said else []
    return "\n".join(lines)


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "–"


def factor(row: dict[str, Any], key: str) -> str:
    value, times = row[key], row[f"{key}_factor"]
    if key == "context" and value >= 2**20:
        return "over a million"
    return f"{value:,}" if times is None else f"{value:,} ({times:g}×)"


def notes(report: dict[str, Any]) -> list[str]:
    """The plan's notes that do not hold for every plan."""
    return [note for note in report["notes"] if note.startswith("tensor=")]


if __name__ == "__main__":
    main()
