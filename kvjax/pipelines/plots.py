"""Pictures of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def _figure(width: float, height: float):
    # matplotlib is slow to import and wants no display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _finish(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def head_importance(importance: np.ndarray, path: Path) -> None:
    """Heat-map of [L, N] scores."""
    layers, heads = importance.shape
    figure, axes = _figure(1.5 + 0.45 * heads, 1.2 + 0.45 * layers)
    image = axes.imshow(importance, aspect="auto", cmap="viridis")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title("Head importance")
    figure.colorbar(image, ax=axes)
    _finish(figure, path)


def accuracy_against_bytes(
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    full: tuple[int, float],
    title: str,
    path: Path,
) -> None:
    """One line a policy.

    Args:
        curves: label → (cache bytes, accuracy, standard error) points.
        full: bytes and accuracy of the full cache, drawn as a horizontal line.
    """
    figure, axes = _figure(6.0, 4.0)
    for marker, (label, points) in zip("osD^v", curves.items(), strict=False):
        size, accuracy, error = np.array(sorted(points)).T
        axes.errorbar(size / 1024, accuracy, error, marker=marker, capsize=3, label=label)
    axes.axhline(full[1], color="grey", linestyle="--", label=f"full ({full[0] / 1024:.0f} KiB)")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("cache a sequence (KiB, log scale)")
    axes.set_ylabel("exact match")
    axes.set_title(title)
    axes.legend()
    _finish(figure, path)
