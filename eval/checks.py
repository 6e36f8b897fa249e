"""Checks of values that people and files give; each error says got and expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

MOST = 5  # problems that one error names


@dataclass(frozen=True)
class Kind:
    """A kind of value: its name for errors, and a test whether a value is of the kind.

    `a | b` is the kind of values that fit either.
    """

    name: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        names = f"{self.name}, or {other.name}"
        return Kind(names, lambda value: self.fits(value) or other.fits(value))


NULL = Kind("null", lambda value: value is None)
TEXT = Kind("text", lambda value: isinstance(value, str))
NAME = Kind("text that is not empty", lambda value: isinstance(value, str) and value != "")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))


def whole(least: int) -> Kind:
    """Whole numbers that are at least `least`; bools are not numbers."""
    return Kind(
        f"≥ {least}, a whole number",
        lambda value: (
            # isinstance(True, int) holds in Python, so bools are excluded by name.
            isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        ),
    )


def number(least: float = -math.inf, most: float = math.inf) -> Kind:
    """Finite numbers from `least` to `most`; bools are not numbers."""
    bounds = [f"≥ {least:g}"] * (least > -math.inf) + [f"≤ {most:g}"] * (most < math.inf)
    return Kind(
        " and ".join(bounds) or "a finite number",
        lambda value: (
            isinstance(value, Real)
            and not isinstance(value, bool)
            and least <= _as_float(value) <= most
            and math.isfinite(_as_float(value))
        ),
    )


def _as_float(value: Any) -> float:
    try:
        return float(value)
    # A whole number beyond float's range counts as infinite, which is out of bounds.
    except OverflowError:
        return math.inf


def problems(
    values: Any, kinds: Mapping[str, Kind], at: str = "", optional: Mapping[str, Kind] | None = None
) -> Iterator[str]:
    """One text for each value that is missing or of another kind.

    Args:
        values: expected to be a mapping from names to values.
        at: text before the values' names, e.g. "all.".
        optional: kinds of values that may be missing.
    """
    if not isinstance(values, Mapping):
        yield f"{at.rstrip('. ') or 'it'} is {shown(values)}, expected an object"
        return
    for name, kind in {**kinds, **(optional or {})}.items():
        if name not in values:
            if name in kinds:
                yield f"{at}{name} is missing, expected {kind.name}"
        elif not kind.fits(values[name]):
            yield f"{at}{name} is {shown(values[name])}, expected {kind.name}"


def shown(value: Any) -> str:
    """The value as one line of at most 60 characters, for an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:59]}…"


def refuse(found: Sequence[str], where: str = "", hint: str = "") -> None:
    """Raises ValueError that names the first problems, if there are any.

    Args:
        where, hint: text before and after the problems.
    """
    if found:
        more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
        raise ValueError(f"{where}{'; '.join(found[:MOST])}{more}{hint}")


def check(kinds: Mapping[str, Kind], **values: Any) -> None:
    """Raises ValueError where a value is of another kind; None means that it was not given."""
    given = {name: value for name, value in values.items() if value is not None}
    refuse(list(problems(given, {name: kinds[name] for name in given})))
