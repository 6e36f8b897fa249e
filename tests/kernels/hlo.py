"""What the text of a compiled program says about copies."""

import math
import re

COPY = re.compile(r"= \w+\[([\d,]+)\]\S* (copy|transpose|convert)\(")


def copies(hlo: str, size: int, only_loops: bool = False) -> list[str]:
    """Lines that copy at least `size` numbers, of all computations or of all but the entry's."""
    found, entry = [], False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            entry = line.startswith("ENTRY")
        copy = COPY.search(line)
        if copy is None or (only_loops and entry):
            continue
        if math.prod(map(int, copy[1].split(","))) >= size:
            found.append(line.strip())
    return found
