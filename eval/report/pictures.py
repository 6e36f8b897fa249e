"""The page's pictures, maps and lines, each drawn for light and for dark pages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.report.page import dark_name
from kvjax.extras import import_extra, pyplot
from kvjax.runs import write_picture

MARKERS = "osD^vPX*"
MAPS = 4  # maps beside each other
DARK = {
    **{f"{part}.facecolor": "#16181d" for part in ("figure", "axes", "savefig")},
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), "#e6e8ec"),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor"), "#a2a9b6"),
    "legend.facecolor": "#23262d",
}
"""matplotlib's settings for dark pages, in the colours of `eval.report.page.STYLE`."""
Points = Sequence[tuple[float, float, float | None]]
"""The points of one line: x, y and the standard error of y."""
Axis = tuple[str, Sequence[Any]]
"""The name of an axis and its labels."""


@dataclass
class Pictures:
    """Draws into a folder; every method returns the name of the file it wrote."""

    folder: Path
    taken: set[str] = field(default_factory=set)

    def maps(
        self,
        name: str,
        values: Mapping[str, np.ndarray],
        rows: Axis,
        columns: Axis,
        limits: tuple[float, float] | None = None,
        what: str = "",
    ) -> str:
        """Heat-maps of [rows, columns] side by side, with one colour bar; nan is blank.

        Args:
            values: by the titles of the maps.
            limits: least and largest value of the colours; None: those of all values.
            what: what the colours are, beside their bar.
        """
        wide = min(MAPS, len(values))
        high = -(-len(values) // wide)
        height, width = next(iter(values.values())).shape
        cell = min(0.45, 9.0 / max(height, width * wide))
        size = (
            max(4.0, 1.5 + wide * max(2.0, 0.5 + cell * width)),
            high * max(1.8, 1.0 + cell * height),
        )
        finite = np.concatenate([each[np.isfinite(each)].ravel() for each in values.values()])
        least, most = limits or (finite.min(), finite.max())

        def draw() -> Any:
            figure, grid = _subplots(high, wide, size, sharex=True, sharey=True, squeeze=False)
            image = None
            for number, (title, each) in enumerate(values.items()):
                axes = grid.flat[number]
                image = axes.imshow(each, aspect="auto", cmap="viridis", vmin=least, vmax=most)
                axes.set_title(_short(title), fontsize=9, wrap=True)
                axes.tick_params(labelbottom=number + wide >= len(values))  # nothing is below it
                for axis, (_, ticks) in ((axes.yaxis, rows), (axes.xaxis, columns)):
                    step = -(-len(ticks) // 16)
                    axis.set_ticks(range(0, len(ticks), step), [str(t) for t in ticks[::step]])
            for axes in list(grid.flat)[len(values) :]:
                axes.set_visible(False)
            figure.supylabel(rows[0], fontsize=10)
            figure.supxlabel(columns[0], fontsize=10)
            figure.colorbar(image, ax=grid, label=what)
            return figure

        return self._save(name, draw)

    def lines(
        self,
        name: str,
        curves: Mapping[str, Points],
        axes_names: tuple[str, str],
        log: tuple[bool, bool] = (False, False),
        level: tuple[str, float] | None = None,
        markers: bool = True,
        percent: bool = False,
    ) -> str:
        """One line for each label.

        Args:
            log: whether the x and the y axis may be logarithmic; values must spread enough.
            level: label and height of a horizontal line.
            percent: the x axis has percents.
        """

        def draw() -> Any:
            figure, axes = _subplots(1, 1, (6.4, 4.2))
            shapes = itertools.cycle(MARKERS)
            for marker, (label, points) in zip(shapes, curves.items(), strict=False):
                x, y, error = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                errors = [e or 0.0 for e in error] if any(error) else None
                shape = {"marker": marker, "markersize": 4} if markers else {}
                axes.errorbar(
                    x, y, errors, label=_short(label), capsize=3 if errors else 0, **shape
                )
            if level is not None:
                axes.axhline(level[1], color="grey", linestyle="--", label=_short(level[0]))
            for index, axis in enumerate((axes.xaxis, axes.yaxis)):
                values: list[Any] = [at[index] for points in curves.values() for at in points]
                # Over less than a factor of three no round number would be a logarithmic tick.
                if log[index] and min(values) > 0 and max(values) > 3 * min(values):
                    (axes.set_xscale, axes.set_yscale)[index]("log")
                    _round_ticks(axis)
            if percent:
                axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda x, _: f"{x:g} %"))
            axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            return figure

        return self._save(name, draw)

    def _save(self, name: str, draw: Callable[[], Any]) -> str:
        # Names of runs and policies have characters that files and links may not have.
        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:60] or "picture"
        file = next(
            candidate
            for candidate in (f"{stem}{'' if n == 1 else f'-{n}'}.png" for n in itertools.count(1))
            if candidate not in self.taken
        )
        self.taken.add(file)
        for settings, path in (({}, file), (DARK, dark_name(file))):
            with pyplot().rc_context(settings):
                write_picture(self.folder / path, draw(), dpi=120)
        return file


def _round_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times each power of ten, as plain numbers."""
    axis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(_ticker().FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(_ticker().NullFormatter())


def _ticker() -> Any:
    return import_extra("matplotlib.ticker", "plots")


def _subplots(rows: int, columns: int, size: tuple[float, float], **settings: Any) -> Any:
    return pyplot().subplots(rows, columns, figsize=size, layout="constrained", **settings)


def _short(label: str) -> str:
    # matplotlib reads text after a dollar sign as mathematics.
    label = label.replace("$", r"\$")
    return label if len(label) <= 48 else label[:47] + "…"
