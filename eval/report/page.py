"""The page's HTML and pictures.

Text becomes HTML only here, and every function escapes its text once. Arguments that are HTML
already say so.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.extras import pyplot
from kvjax.runs import write_picture

STYLE = """
:root { color-scheme: light dark; --line: #d5d8de; --soft: #f3f4f7; --text: #1c1f26;
  --page: #fff; --quiet: #5b6270; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f4a; --soft: #23262d; --text: #e6e8ec; --page: #16181d; --quiet: #a2a9b6; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
p, figcaption { color: var(--quiet); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left;
  white-space: nowrap; }
td.number, th.number { text-align: right; }
th { background: var(--soft); }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem; background: #fff; }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; border-radius: .4rem;
  font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page.

    Args:
        parts: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A headed part of the page.

    Args:
        parts: HTML.
    """
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table that scrolls sideways on narrow pages; columns of numbers are right-aligned.

    Args:
        rows: texts and numbers; None is an empty cell.
    """
    rows = [list(row) for row in rows]
    # A column is right-aligned if all its filled cells are numbers.
    right = [
        bool(rows) and all(_is_number(row[at]) for row in rows if row[at] is not None)
        for at in range(len(header))
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = [' class="number"' if number else "" for number in right]
        inner = "".join(
            f"<{tag}{kind}>{escape('' if cell is None else str(cell))}</{tag}>"
            for cell, kind in zip(cells, kinds, strict=True)
        )
        return f"<tr>{inner}</tr>"

    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table>{named}<thead>{line("th", header)}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(name: str, alt: str, caption: str = "") -> str:
    """A picture in the page's folder.

    Args:
        alt: a description for readers who do not see the picture.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = escape(name, quote=True)
    return (
        f'<figure><img src="{source}" alt="{escape(alt, quote=True)}" loading="lazy">'
        f"{below}</figure>"
    )


def code(text: str) -> str:
    """A command."""
    return f"<pre><code>{escape(text)}</code></pre>"


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values; names with None or "" are left out."""
    inner = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in pairs
        if value is not None and value != ""
    )
    return f"<dl>{inner}</dl>"


def number(value: float | None, digits: int = 3) -> str | None:
    """A number with `digits` decimals; very small ones and those from 1000 on with 4 digits."""
    if value is None:
        return None
    small = value != 0 and abs(value) < 10**-digits
    return f"{value:.4g}" if small or abs(value) >= 1000 else f"{value:.{digits}f}"


def with_error(part: dict[str, Any]) -> str:
    """The score, with ± standard error where there is one."""
    error = part.get("standard_error")
    return f"{number(part['score'])}" + ("" if error is None else f" ± {number(error)}")


def size(value: float | None) -> str | None:
    """Bytes with a unit."""
    if value is None:
        return None
    amount = float(value)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _is_number(cell: Any) -> bool:
    text = str(cell).split(" ")[0].rstrip("%")
    try:
        float(text)
    except ValueError:
        return False
    return True


MARKERS = "osD^vPX*"
Points = Sequence[tuple[float, float, float | None]]
"""The points of one line: x, y and the standard error of y."""


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
            limits: least and largest value of the colours; None: those of `values`.
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
            log: whether the x and the y axis may be logarithmic; values must spread enough.
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
            # Over less than a factor of three a logarithmic axis has no round numbers as ticks.
            wide = min(values) > 0 and max(values) > 3 * min(values)
            scale("log" if log[index] and wide else "linear")
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.set_title(title, fontsize=10, wrap=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        return self._save(figure, name)

    def _save(self, figure: Any, name: str) -> str:
        # Names of runs and policies have characters that files and links may not have.
        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:60] or "picture"
        file = next(
            candidate
            for candidate in (f"{stem}{'' if n == 1 else f'-{n}'}.png" for n in itertools.count(1))
            if candidate not in self.taken
        )
        self.taken.add(file)
        write_picture(self.folder / file, figure, dpi=120)
        return file


def _figure(width: float, height: float) -> Any:
    return pyplot().subplots(figsize=(width, height), layout="constrained")


def _short(label: str) -> str:
    # matplotlib reads text after a dollar sign as mathematics.
    label = label.replace("$", r"\$")
    return label if len(label) <= 48 else label[:47] + "…"
