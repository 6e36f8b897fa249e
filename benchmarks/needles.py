"""Needles on real models: one file and one table of finished runs of `python -m eval`.

    python -m benchmarks.needles RUN... [--names FOLDER=NAME ...] [--notes TEXT ...]

RUN is the folder of a run of `eval needle` or `eval reasoning`. Each run's results.json has its
command, commit and versions; here paths are cut to their last part, and the folder of a model may
get the model's name. The table beside the file has the right answers of each policy and length as
counts, and the notes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import without_folders
from eval.predictions import PREDICTIONS, RESULTS, read
from kvjax.paths import local_path

OUT = Path("benchmarks/results/needles.json")
SETTINGS = re.compile(r"--set ('[^']*'|\S+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path)
    parser.add_argument("--out", type=local_path, default=OUT)
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--notes", nargs="*", default=[])
    args = parser.parse_args()
    names = dict(name.split("=", 1) for name in args.names)
    found = [collected(folder, names) for folder in args.runs]
    args.out.write_text(json.dumps({"notes": args.notes, "runs": found}, indent=1) + "\n")
    table = args.out.with_suffix(".md")
    table.write_text("\n".join(page(found, args.notes)) + "\n")
    print(f"written: {args.out}, {table}")


def collected(folder: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """A run: what it was, and the right answers and bytes of each policy and length.

    Args:
        names: of models, by the names of their folders.
    """
    report = json.loads((folder / RESULTS).read_text())
    predictions = read(folder / PREDICTIONS)
    rows = []
    for policy in report["policies"]:
        own = [p for p in predictions if p.policy == policy["policy"]]
        lengths = sorted({p.group.partition("/")[0] for p in own}, key=int)
        scores = {n: [p.score for p in own if p.group.startswith(f"{n}/")] for n in lengths}
        rows.append(
            {
                "policy": without_folders(policy["policy"]),
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
        "model": names.get(model, model),
        **facts,
        "command": without_folders(report["command"]),
        "policies": rows,
    }


def page(runs: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> list[str]:
    """The lines of the table, after the notes."""
    lines = [
        "# Needles on real models",
        "",
        "Right answers by prompt length in tokens. [needles.json](needles.json) has each run's "
        "command, bytes and standard errors. The bytes of decoded answers include room for new "
        "tokens.",
        "",
        *(line for note in notes for line in (note, "")),
        "| model | task | prompt | protocol | commit | policy | of the bytes | right answers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        settings = SETTINGS.findall(run["command"])
        task = ", ".join([run["task"], *(text for text in settings if "depths=" not in text)])
        for row in run["policies"]:
            right = ", ".join(f"{length}: {count}" for length, count in row["right"].items())
            shares = f"{row['of_full_bytes']:.1%}"
            facts = (run["model"], task, run["prompt"], run["protocol"], run["commit"])
            lines.append(f"| {' | '.join((*facts, row['policy'], shares, right))} |")
    return lines


if __name__ == "__main__":
    main()
