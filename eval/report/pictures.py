"""The pictures of the page, PNG files beside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MARKERS = "osD^vPX*"
Points = Sequence[tuple[float, float, float | None]]
"""x, y and the standard error of y, of one line."""


@dataclass
class Pictures:
    """Draws into a folder; every method returns the name of the file it wrote."""

    folder: Path
    taken: set[str] = field(default_factory=set)

    def heat(
        self,
        name: str,
        values: np.ndarray,
        title: str,
        rows: tuple[str, Sequence[Any]],
        columns: tuple[str, Sequence[Any]],
        limits: tuple[float, float] | None = None,
    ) -> str:
        """Heat-map of [rows, columns]; nan is blank.

        Args:
            rows, columns: name of the axis and its labels.
            limits: of the colours; those of the values otherwise.
        """
        height, width = values.shape
        cell = min(0.45, 9.0 / max(height, width))
        figure, axes = _figure(max(4.0, 1.8 + cell * width), max(2.2, 1.2 + cell * height))
        least, most = limits or (None, None)
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=least, vmax=most)
        for axis, (label, ticks) in ((axes.yaxis, rows), (axes.xaxis, columns)):
            step = -(-len(ticks) // 16)
            axis.set_ticks(range(0, len(ticks), step), [str(t) for t in ticks[::step]])
            axis.set_label_text(label)
        axes.set_title(title, fontsize=10, wrap=True)
        figure.colorbar(image, ax=axes)
        return self._save(figure, name)

    def lines(
        self,
        name: str,
        curves: Mapping[str, Points],
        axes_names: tuple[str, str],
        title: str = "",
        log: tuple[bool, bool] = (False, False),
        level: tuple[str, float] | None = None,
        markers: bool = True,
    ) -> str:
        """One line for each label.

        Args:
            log: whether the x and the y axis are logarithmic, where values spread enough.
            level: label and height of a horizontal line.
        """
        figure, axes = _figure(6.4, 4.2)
        for marker, (label, points) in zip(itertools.cycle(MARKERS), curves.items(), strict=False):
            x, y, error = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            errors = [e or 0.0 for e in error] if any(error) else None
            shape = {"marker": marker, "markersize": 4} if markers else {}
            axes.errorbar(x, y, errors, label=_short(label), capsize=3 if errors else 0, **shape)
        if level is not None:
            axes.axhline(level[1], color="grey", linestyle="--", label=_short(level[0]))
        for index, scale in enumerate((axes.set_xscale, axes.set_yscale)):
            values: list[Any] = [p[index] for points in curves.values() for p in points]
            # Over less than a factor of three a logarithmic axis has no round numbers to show.
            wide = min(values) > 0 and max(values) > 3 * min(values)
            scale("log" if log[index] and wide else "linear")
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.set_title(title, fontsize=10, wrap=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return self._save(figure, name)

    def _save(self, figure: Any, name: str) -> str:
        from matplotlib import pyplot

        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:60] or "picture"
        file = next(
            candidate
            for candidate in (f"{stem}{'' if n == 1 else f'-{n}'}.png" for n in itertools.count(1))
            if candidate not in self.taken
        )
        self.taken.add(file)
        figure.savefig(self.folder / file, dpi=120)
        pyplot.close(figure)
        return file


def _figure(width: float, height: float) -> Any:
    # matplotlib is slow to import and wants no display.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _short(label: str) -> str:
    # Text after a dollar sign would be read as mathematics.
    label = label.replace("$", r"\$")
    return label if len(label) <= 48 else label[:47] + "…"
