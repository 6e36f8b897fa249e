"""A picture of a run: accuracy of each kind of question over the tokens seen, stages marked."""

from __future__ import annotations

import json
from pathlib import Path

from train.episodes import KINDS
from train.recipe import Recipe


def plot_curve(recipe: Recipe, metrics: Path, out: Path) -> None:
    """Draws a metrics.jsonl into a PNG.

    Raises:
        ValueError: the log is empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if not lines:
        raise ValueError(f"{metrics} is empty")
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for kind in KINDS:
        points = [(x["tokens"] / 1e6, x["accuracy"][kind]) for x in lines if kind in x["accuracy"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    for before, line in zip([None, *lines], lines, strict=False):
        if before is None or before["stage"] != line["stage"]:
            x = (before["tokens"] if before else 0) / 1e6
            axes.axvline(x, color="0.8", zorder=0)
            length = recipe.stages[line["stage"]].episodes.length
            axes.text(x, 1.02, f" {length}", color="0.4", fontsize=7)
    axes.set(
        xlabel="tokens seen, millions",
        ylabel="whole answers right, training stage",
        ylim=(0, 1.08),
        title="Pretraining; a line starts a stage, the number is its sequence length",
    )
    axes.legend(loc="lower right")
    figure.savefig(out, dpi=110)
    plt.close(figure)
