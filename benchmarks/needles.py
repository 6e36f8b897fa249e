"""Needles on real models: one file and one table of finished runs of `python -m eval`.

    python -m benchmarks.needles RUN... [--out benchmarks/results/needles.json]

RUN is the folder of a run of `eval needle` or `eval reasoning`. Each run's results.json has its
command, commit and versions; here paths are cut to their last part. The table beside the file has
the right answers of each policy and length as counts.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from eval.predictions import PREDICTIONS, RESULTS, read
from kvjax.paths import local_path

OUT = Path("benchmarks/results/needles.json")
FOLDERS = re.compile(r"(?<=[ =])/\S*/(?=[^/\s])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path)
    parser.add_argument("--out", type=local_path, default=OUT)
    args = parser.parse_args()
    found = [collected(folder) for folder in args.runs]
    args.out.write_text(json.dumps({"runs": found}, indent=1) + "\n")
    table = args.out.with_suffix(".md")
    table.write_text("\n".join(page(found)) + "\n")
    print(f"written: {args.out}, {table}")


def collected(folder: Path) -> dict[str, Any]:
    """A run: what it was, and the right answers and bytes of each policy and length."""
    report = json.loads((folder / RESULTS).read_text())
    predictions = read(folder / PREDICTIONS)
    rows = []
    for policy in report["policies"]:
        own = [p for p in predictions if p.policy == policy["policy"]]
        lengths = sorted({p.group.partition("/")[0] for p in own}, key=int)
        scores = {n: [p.score for p in own if p.group.startswith(f"{n}/")] for n in lengths}
        rows.append(
            {
                "policy": FOLDERS.sub("", policy["policy"]),
                "right": {n: f"{sum(found):g} of {len(found)}" for n, found in scores.items()},
                "score": policy["all"]["score"],
                "standard_error": policy["all"]["standard_error"],
                "of_full_bytes": round(policy["cache_bytes"] / policy["full_cache_bytes"], 4),
            }
        )
    kept = ("task", "metric", "protocol", "prompt", "items", "seconds", "date", "device")
    facts = {name: report[name] for name in (*kept, "versions", "commit")}
    model = Path(report["model"]).name
    return {
        "model": model,
        **facts,
        "command": FOLDERS.sub("", report["command"]),
        "policies": rows,
    }


def page(runs: list[dict[str, Any]]) -> list[str]:
    """The lines of the table."""
    lines = [
        "# Needles on real models",
        "",
        "Right answers by prompt length in tokens. [needles.json](needles.json) has each run's "
        "command, commit, bytes and standard errors.",
        "",
        "| model | task | prompt | protocol | policy | share of the bytes | right answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        settings = " ".join(re.findall(r"haystack=\S+", run["command"]))
        task = f"{run['task']} {settings}".strip()
        for row in run["policies"]:
            right = ", ".join(f"{length}: {count}" for length, count in row["right"].items())
            shares = f"{row['of_full_bytes']:.1%}"
            cells = (run["model"], task, run["prompt"], run["protocol"], row["policy"], shares)
            lines.append(f"| {' | '.join((*cells, right))} |")
    return lines


if __name__ == "__main__":
    main()
