"""The comparison's table and pictures, from the files of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.compare.config import CompareConfig, Job, final_jobs, search_jobs
from train.compare.runs import best_rate, read_result


def report(config: CompareConfig, out: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Writes results.json, table.md and loss.png.

    Args:
        before: accuracies of the model before fine-tuning.
    """
    rows = [row for arm in config.arms for row in arm_rows(config, out, arm)]
    searches = {
        arm: {
            f"{job.rate:g}": read_result(out, job)["held_out"][-1][1]
            for job in search_jobs(config, arm)
        }
        for arm in config.arms
    }
    result = {"before": before, "searches": searches, "rows": rows}
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "table.md").write_text(table(config, result))
    plot(config, out)
    return result


def arm_rows(config: CompareConfig, out: Path, arm: str) -> list[dict[str, Any]]:
    """One row for each rate: means over the seeds, and their standard errors."""
    best = best_rate(config, out, arm)
    jobs = final_jobs(config, arm, best)
    rows = []
    for rate in dict.fromkeys(job.rate for job in jobs):
        found = [read_result(out, job) for job in jobs if job.rate == rate]
        curve = np.array([[loss for _, loss in run["held_out"]] for run in found])
        quarter = curve.shape[1] // 4
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "chosen": rate == best,
                "seeds": len(found),
                "trainable": found[0]["trainable"],
                "loss_quarter": mean_and_error(curve[:, quarter]),
                "loss_half": mean_and_error(curve[:, curve.shape[1] // 2]),
                "loss_end": mean_and_error(curve[:, -1]),
                "accuracy": {
                    family: mean_and_error(
                        np.array([run["accuracy"][family]["accuracy"] for run in found])
                    )
                    for family in config.families
                },
            }
        )
    return rows


def mean_and_error(values: np.ndarray) -> list[float]:
    """[mean, standard error of the mean over seeds]; the error of one seed is 0."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [round(float(values.mean()), 4), round(float(error), 4)]


def table(config: CompareConfig, result: dict[str, Any]) -> str:
    """The rows as markdown."""
    families = list(config.families)
    heads = ["arm", "trains", "rate", "loss at ¼", "at ½", "at the end", *families]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]

    def cell(pair: list[float]) -> str:
        return f"{pair[0]:.3f} ± {pair[1]:.3f}"

    before = [f"{result['before'][family]['accuracy']:.3f}" for family in families]
    lines.append(" | ".join(["before", "", "", "", "", "", *before]))
    for row in result["rows"]:
        lines.append(
            " | ".join(
                [
                    row["arm"],
                    f"{row['trainable']:,}",
                    f"{row['rate']:g}" + (" (chosen)" if row["chosen"] else ""),
                    *(cell(row[f"loss_{when}"]) for when in ("quarter", "half", "end")),
                    *(cell(row["accuracy"][family]) for family in families),
                ]
            )
        )
    return "".join(f"| {line} |\n" for line in lines)


def plot(config: CompareConfig, out: Path) -> None:
    """Held-out loss over the steps: mean and standard deviation over the seeds, per rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for arm in config.arms:
        best = best_rate(config, out, arm)
        for axis, rate in zip(axes, (best, config.paper_rate), strict=True):
            jobs = [job for job in final_jobs(config, arm, best) if job.rate == rate]
            draw(axis, out, jobs, f"{arm}, {rate:g}" if axis is axes[0] else arm)
    axes[0].set(title="each arm at its chosen rate", ylabel="held-out loss, nats a token")
    axes[1].set(title=f"TransMLA's rate, {config.paper_rate:g}")
    for axis in axes:
        axis.set(xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)


def draw(axis: Any, out: Path, jobs: list[Job], label: str) -> None:
    """One arm's band."""
    runs = [read_result(out, job)["held_out"] for job in jobs]
    steps = [step for step, _ in runs[0]]
    losses = np.array([[loss for _, loss in run] for run in runs])
    mean, spread = losses.mean(axis=0), losses.std(axis=0)
    [line] = axis.plot(steps, mean, label=label)
    axis.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)
