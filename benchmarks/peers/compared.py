"""Policies of kvjax beside kvpress's presses, prompt by prompt.

    python -m benchmarks.peers.compared OURS.jsonl PRESSES.jsonl [--policies headkv snapkv]

OURS.jsonl has the batches of `benchmarks.headkv_real run`, PRESSES.jsonl the rows of
`benchmarks.peers kvpress` on the same prompts, as `benchmarks.headkv_real prompts` writes them.
Only prompts that both have are counted, and only tasks that the full cache can do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from benchmarks.headkv_real_report import LEAST_FULL
from kvjax.paths import local_path
from kvjax.runs import whole_lines, write_json, write_whole
from kvjax.scoring import FULL

OUT = Path("benchmarks/results/headkv_real_kvpress.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=local_path)
    parser.add_argument("presses", type=local_path)
    parser.add_argument("--policies", nargs="+", default=["headkv", "snapkv"])
    parser.add_argument("--out", type=local_path, default=OUT)
    args = parser.parse_args()
    settings, *batches = map(json.loads, whole_lines(args.ours))
    facts, *rows = map(json.loads, whole_lines(args.presses))
    tasks = settings["tasks"]
    full = {t: np.mean([b["right"][FULL][i] == "1" for b in batches]) for i, t in enumerate(tasks)}
    rows = [r for r in rows if r["index"] < len(batches) * len(tasks)]
    counted = [r for r in rows if full[r["task"]] >= LEAST_FULL]
    agree = [ours(batches, tasks, r["index"], FULL) == r["right"][FULL] for r in rows]
    found = {
        **environment("benchmarks.peers.compared"),
        "kvpress": facts,
        "prompts": len(counted),
        "tasks": [task for task in tasks if full[task] >= LEAST_FULL],
        "full_cache_agrees": f"{sum(agree)} of {len(agree)}",
        "rows": compare(settings, batches, counted, args.policies),
    }
    write_json(args.out, found)
    write_whole(args.out.with_suffix(".md"), "\n".join(page(found, args.policies)) + "\n")
    print(f"written: {args.out}, {args.out.with_suffix('.md')}")


def ours(batches: list[dict[str, Any]], tasks: list[str], index: int, name: str) -> bool:
    """Whether an answer was right in our run; batches have one prompt of each task in order."""
    return batches[index // len(tasks)]["right"][name][index % len(tasks)] == "1"


def compare(
    settings: dict[str, Any],
    batches: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    policies: list[str],
) -> list[dict[str, Any]]:
    """A row for each size and press: its share of right answers, and each policy's on the same
    prompts with the paired difference and its standard error."""
    found = []
    for size in settings["kv_sizes"]:
        for press in [name for name in rows[0]["right"] if name != FULL]:
            same = [r for r in rows if str(size) in r["right"].get(press, {})]
            if len(same) < 2:
                continue
            theirs = np.asarray([r["right"][press][str(size)] for r in same], float)
            row = {"kv_size": size, "press": press, "prompts": len(same)}
            row["right"] = round(float(theirs.mean()), 4)
            for name in policies:
                at = [ours(batches, settings["tasks"], r["index"], f"{name} {size}") for r in same]
                gap = np.asarray(at, float) - theirs
                row[name] = {
                    "right": round(float(np.mean(at)), 4),
                    "difference": round(float(gap.mean()), 4),
                    "standard_error": round(float(gap.std(ddof=1) / np.sqrt(len(gap))), 4),
                }
            found.append(row)
    return found


def page(found: dict[str, Any], policies: list[str]) -> list[str]:
    """The lines of the table."""
    versions = ", ".join(f"{n} {v}" for n, v in found["kvpress"]["versions"].items())
    heads = [f"kvjax {name}, difference" for name in policies]
    lines = [
        "# kvpress's presses on the same prompts",
        "",
        f"`{found['command']}`, commit {found['commit']}. {versions}; SmolLM2-135M-Instruct in "
        f"float32, {found['prompts']} prompts of {', '.join(found['tasks'])}. Percent of right "
        "answers; in brackets the paired difference to the press and its standard error. The full "
        f"cache of both libraries answers alike on {found['full_cache_agrees']} prompts.",
        "",
        f"| KV size | press | prompts | right | {' | '.join(heads)} |",
        "|---|---|---|---|" + "---|" * len(heads),
    ]
    for row in found["rows"]:
        cells = [
            f"{100 * row[n]['right']:.1f} ({100 * row[n]['difference']:+.1f} ± "
            f"{100 * row[n]['standard_error']:.1f})"
            for n in policies
        ]
        first = f"| {row['kv_size']} | {row['press']} | {row['prompts']} | {100 * row['right']:.1f}"
        lines.append(f"{first} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
