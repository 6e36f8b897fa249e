"""Long lists of tensors in an error, so that a reader sees what is wrong at a glance."""

import itertools
import math
import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # the layer's or expert's
FEW = 3
MOST = 30


def collapsed(problems: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines before + name + after; names that differ only in their numbers share one.

    Of more than thirty lines the others are counted.

    >>> collapsed(("missing ", f"layers.{i}.q", "") for i in (0, 1, 2, 5))
    ['missing layers.{0-2,5}.q']
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for before, name, after in problems:
        groups.setdefault((before, NUMBER.sub("#", name), after), []).append(name)
    lines = []
    for (before, _, after), names in groups.items():
        lines += [f"{before}{name}{after}" for name in names[:FEW]] if len(names) <= FEW else []
        if len(names) > FEW:
            lines.append(f"{before}{_joined(names)}{after}")
    if len(lines) > MOST:
        lines[MOST:] = [f"and {len(lines) - MOST} more of the kind"]
    return lines


def _joined(names: list[str]) -> str:
    """layers.{0-31}.q for layers.0.q to layers.31.q."""
    numbers = [sorted(set(column)) for column in zip(*map(_numbers, names), strict=True)]
    texts = iter(_ranges(column) for column in numbers)
    joined = NUMBER.sub(lambda _: next(texts), names[0])
    whole = math.prod(len(column) for column in numbers) == len(names)
    return joined if whole else f"{joined} ({len(names)} tensors)"


def _numbers(name: str) -> list[int]:
    return [int(number) for number in NUMBER.findall(name)]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    found = []
    for _, run in runs:
        members = [number for _, number in run]
        found.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return "{" + ",".join(found) + "}"
