"""The page's HTML.

Text becomes HTML only here, and every function escapes its text once. Arguments that are HTML
already say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

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
p.lead { color: var(--text); font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .7rem; text-align: left;
  white-space: nowrap; }
td.number, th.number { text-align: right; }
th { background: var(--soft); }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: .4rem; }
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


def lead(text: str) -> str:
    """What a section says, in one sentence."""
    return f'<p class="lead">{escape(text)}</p>'


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
    """A picture in the page's folder, with another file for dark pages.

    Args:
        name: of the file, from `eval.report.pictures.Pictures`.
        alt: a description for readers who do not see the picture.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    light, dark = (escape(file, quote=True) for file in (name, dark_name(name)))
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(alt, quote=True)}" loading="lazy"></picture>'
        f"{below}</figure>"
    )


def dark_name(name: str) -> str:
    """The file of a picture for dark pages."""
    return name.removesuffix(".png") + ".dark.png"


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
