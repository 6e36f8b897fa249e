"""The result file and the table of `benchmarks.headkv_real`: shares, paired differences, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from kvjax.runs import whole_lines, write_json, write_whole
from kvjax.scoring import FULL

LEAST_FULL = 0.3
"""Tasks in which the full cache is right less often do not count."""
ENDS = {
    "begun": "Prompts end with the beginning of the answer.",
    "asked": "Prompts end where the answer begins; its beginning is fed after the compression.",
}
BOUND = 1.645
"""Standard errors below the mean to a lower bound that holds with 95 %."""


def report(path: Path, chosen_on: Sequence[str], baseline: str) -> None:
    """Writes the result file at `path` and the table beside it, from the finished batches.

    Args:
        chosen_on: tasks that took part in the choice of settings.
        baseline: the policy that the others are compared with, prompt by prompt.
    """
    settings, *lines = [json.loads(line) for line in whole_lines(path.with_suffix(".jsonl"))]
    right = right_answers(lines, len(settings["tasks"]))
    full = {task: float(right[FULL][:, i].mean()) for i, task in enumerate(settings["tasks"])}
    counted = [task for task, share in full.items() if share >= LEAST_FULL]
    groups = {task: [task] for task in settings["tasks"]}
    groups |= {"chosen on": [task for task in counted if task in chosen_on]}
    groups |= {"judged": [task for task in counted if task not in chosen_on], "all": counted}
    rows = []
    for policy in settings["policies"][1:]:
        for size in settings["kv_sizes"]:
            for group, tasks in groups.items():
                at = [settings["tasks"].index(task) for task in tasks]
                own, base, whole = (
                    right[name][:, at].reshape(-1).astype(float)
                    for name in (f"{policy} {size}", f"{baseline} {size}", FULL)
                )
                rows.append({"policy": policy, "kv_size": size, "group": group})
                rows[-1] |= compared(own, base, whole)
    kept = ("date", "processor", "versions", "commit", "command")
    facts = {name: lines[0][name] for name in kept}
    # A run that was continued has batches of several commits.
    facts["commit"] = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    facts["made_by"] = environment("benchmarks.headkv_real")["commit"]
    read = [length for line in lines for length in line["lengths"]]
    facts["lengths"] = [min(read), max(read)]
    facts["prompts"] = {group: len(lines) * len(tasks) for group, tasks in groups.items()}
    facts["cpu_seconds"] = round(sum(line["cpu_seconds"] for line in lines))
    found = {**settings, **facts, "chosen_on": list(chosen_on), "full": full, "rows": rows}
    write_json(path, found)
    write_whole(path.with_suffix(".md"), "\n".join(page(found, baseline)) + "\n")


def right_answers(lines: Sequence[dict[str, Any]], tasks: int) -> dict[str, np.ndarray]:
    """By policy, bool [batches, tasks]: a batch has one prompt of each task."""
    rows = [{n: [c == "1" for c in bits] for n, bits in line["right"].items()} for line in lines]
    return {name: np.asarray([row[name] for row in rows]).reshape(-1, tasks) for name in rows[0]}


def compared(own: np.ndarray, base: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """Share of right answers, paired difference to the baseline, and ratio to the full cache.

    The standard error of the ratio of two means is that of own − ratio · whole, over the mean of
    whole.
    """
    n = len(own)
    differences = own - base
    ratio = own.mean() / whole.mean() if whole.any() else float("nan")
    deviation = (own - ratio * whole).std(ddof=1) / np.sqrt(n) / max(whole.mean(), 1 / n)
    numbers = {
        "right": own.mean(),
        "difference": differences.mean(),
        "standard_error": differences.std(ddof=1) / np.sqrt(n),
        "of_full": ratio,
        "of_full_at_least": ratio - BOUND * deviation,
    }
    return {name: None if np.isnan(x) else round(float(x), 4) for name, x in numbers.items()}


def page(found: dict[str, Any], baseline: str) -> list[str]:
    """The lines of the table."""
    shares = ", ".join(f"{task} {share:.3f}" for task, share in found["full"].items())
    lines = [
        "# Budgets of heads on a real model",
        "",
        f"`{found['command']}`, commits {found['commit']}, {found['cpu_seconds'] / 60:.0f} minutes "
        f"of processor time. {found['prompts']['all']} prompts of {min(found['lengths'])} to "
        f"{max(found['lengths'])} tokens, without tasks that do not count. {ENDS[found['form']]} "
        f"The spans of headkv were chosen on other prompts of {' and '.join(found['chosen_on'])}, "
        "its queries and their fade on other prompts of all kinds, for SmolLM2.",
        "",
        f"Full cache: {shares}. A task below {LEAST_FULL} does not count.",
        "",
    ]
    for group in ("all", "judged", "chosen on", *found["tasks"]):
        own = {(r["policy"], r["kv_size"]): r for r in found["rows"] if r["group"] == group}
        lines += [
            f"## {group}: {found['prompts'][group]} prompts",
            "",
            f"Percent of right answers; paired difference to {baseline} ± its standard error.",
            "",
            "| KV size | " + " | ".join(str(size) for size in found["kv_sizes"]) + " |",
            "|---|" + "---|" * len(found["kv_sizes"]),
        ]
        for policy in found["policies"][1:]:
            cells = [cell(own[policy, size], policy == baseline) for size in found["kv_sizes"]]
            lines.append(f"| {policy} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def cell(row: dict[str, Any], is_baseline: bool) -> str:
    text = f"{100 * row['right']:.1f}"
    if is_baseline:
        return text
    return f"{text} ({100 * row['difference']:+.1f} ± {100 * row['standard_error']:.1f})"
