"""The numbers that settings may be: one check for all settings, one error for all that are wrong.

Comparisons with NaN are false, so that `if rate <= 0` lets NaN pass. A `Range` says what is
allowed, and everything else is a problem.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds; True and False are no numbers.

    Attributes:
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        whole: integers only.
        optional: None is allowed too.
    """

    least: int | float = -math.inf
    most: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf
    whole: bool = False
    optional: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number.

        Devices compute in float32, so that 1 − 1e-9 is no number below 1, nor 1e39 a finite one.
        """
        if value is None:
            return self.optional
        number = _integer(value) if self.whole else _float32(value)
        if number is None or (isinstance(number, float) and not math.isfinite(number)):
            return False
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{kind} from {self.least} to {self.most}"
        named = (
            ("of at least", self.least),
            ("above", self.above),
            ("of at most", self.most),
            ("below", self.below),
        )
        bounds = [f"{name} {bound}" for name, bound in named if math.isfinite(bound)]
        return f"{kind} {' and '.join(bounds)}" if bounds else kind


COUNT = Range(least=1, most=2**31 - 1, whole=True)
"""How many of something there are."""
SIZE = Range(least=0, most=2**31 - 1, whole=True)
"""How many of something there are, or none."""
SEED = Range(least=0, most=2**63 - 1, whole=True)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
SHARE = Range(least=0, most=1)


def optional(allowed: Range) -> Range:
    """The same numbers, or None."""
    return Range(**{**vars(allowed), "optional": True})


def out_of_range(
    values: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = ""
) -> list[str]:
    """A sentence about each setting that is no number of its range.

    Args:
        values: settings by name, such as `vars` of a dataclass; others than `ranges` has are not
            looked at.
        prefix: what stands before the names.
    """
    return [
        f"{prefix}{name} is {_shown(values[name])}, expected {allowed}"
        for name, allowed in ranges.items()
        if not allowed.holds(values[name])
    ]


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises ValueError that names all settings out of their range; see `out_of_range`."""
    problems = out_of_range(values, ranges)
    if problems:
        raise ValueError("; ".join(problems))


def _integer(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _float32(value: Any) -> float | None:
    scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not scalar or isinstance(value, bool | np.bool_):
        return None
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    """The value; with a hint where YAML took a number for a text, and where float32 rounds it."""
    if isinstance(value, str):
        number = _from_text(value)
        hint = "" if number is None else f" (a text: YAML reads a number as in {number:.1e})"
        return f"{value[:40]!r}{hint}"
    number = _float32(value) if isinstance(value, float) else None
    rounded = number in (0.0, 1.0, math.inf, -math.inf) and number != value
    return f"{value} ({number} in float32)" if rounded else f"{value}"[:40]


def _from_text(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
