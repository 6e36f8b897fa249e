"""Numbers in answers without their dress: typography, LaTeX, and Markdown's emphasis."""

from __future__ import annotations

import re

DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
WIDE = dict(zip("０１２３４５６７８９，．：＄％＋／⁄", "0123456789,.:$%+//", strict=True))
INVISIBLE = dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")
CHARACTERS = str.maketrans(DASHES | WIDE | INVISIBLE)

NARROW = "\u00a0\u2006\u2007\u2008\u2009\u200a\u202f"
"""Spaces that typographers set inside numbers."""
BETWEEN_THOUSANDS = f"{NARROW}_'\u2019"

LATEX_SPACE = re.compile(r"\{\\,\}|\\[,;: ]|\\thinspace\b|(?<!\\)~|&nbsp;|&thinsp;")
WRAPPER = re.compile(
    r"\\+(?:boxed|fbox|mbox|hbox|text(?:bf|it|rm|sf|tt|normal|style)?|emph|underline|boldsymbol|bm"
    r"|math(?:bf|it|rm|sf|tt|normal)|displaystyle|left|right)(?![a-zA-Z])\s*"
)
FRACTION = re.compile(r"(?<![\d}])\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
ESCAPED = re.compile(r"\\([$%#&])")
MATH = re.compile(r"\\[()\[\]]|(?<![\^_])\{|\}|`+")
# Stars and underscores at the edge of a word. Those between two factors are an operator.
EMPHASIS = re.compile(r"(?<![\w)*])[*_]+(?=[^\s*_])|(?<=[^\s*_])[*_]+(?![\w(*])")


def plain(text: str, spaces: bool = False) -> str:
    r"""The text with each number as it would be typed: "\boxed{1{,}234}" has 1,234 in it.

    Separators of thousands become commas. Lists ("1,2"), ranges ("3-4"), products ("2*3") and
    powers keep their form.

    Args:
        spaces: whether an ordinary space separates thousands too, as in "10 000".
    """
    text = FRACTION.sub(r"\1/\2", text.translate(CHARACTERS))
    text = text.replace("\\!", "").replace("{,}", ",")
    text = ESCAPED.sub(r"\1", WRAPPER.sub("", LATEX_SPACE.sub("\u2009", text)))
    between = BETWEEN_THOUSANDS + " " * spaces
    groups = rf"(?<![\w.,])[1-9]\d{{0,2}}(?:[{between}]\d{{3}})+(?!\d|-[a-zA-Z])"
    text = re.sub(groups, lambda found: re.sub(f"[{between}]", ",", found[0]), text)
    text = re.sub(f"[{NARROW}]", " ", text)
    return MATH.sub(" ", EMPHASIS.sub("", text))


def whole_numbers(text: str) -> list[int]:
    """All whole numbers, signs ignored: "1,234" is one number and "1,2" are two."""
    found = re.findall(r"(?<!\d)[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+", plain(text))
    return [int(number.replace(",", "")) for number in found]
