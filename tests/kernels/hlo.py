"""What the text of a compiled program says about copies."""

import math
import re

COPY = re.compile(
    r"= \w+\[([\d,]+)\]\S* (?:(?:copy|transpose|convert)\(|fusion\(.*calls=%wrapped_copy)"
)
MOVE = re.compile(r"= \(\w+\[([\d,]+)\]\S*, .*?\) (?:copy|slice)-start\(")
LOOP = re.compile(r"while\(.*body=%([\w.-]+)")


def copies(hlo: str, size: int, where: str = "anywhere") -> list[str]:
    """Lines that copy at least `size` numbers.

    Args:
        where: "anywhere"; "not entry", in all computations but the entry's; or "loop", in the body
            of the entry's loop itself (not in branches that it seldom takes).
    """
    computations = _computations(hlo)
    entry = next(name for name, lines in computations.items() if name.startswith("ENTRY"))
    if where == "loop":
        body = next(m[1] for line in computations[entry] if (m := LOOP.search(line)))
        chosen = [name for name in computations if name.lstrip("%") == body]
    else:
        chosen = [name for name in computations if where == "anywhere" or name != entry]
    return [line for name in chosen for line in computations[name] if _numbers(line) >= size]


def moves(hlo: str, size: int) -> list[str]:
    """Lines that start to move at least `size` numbers from one memory to another."""
    lines = (line.strip() for line in hlo.splitlines())
    found = ((line, MOVE.search(line)) for line in lines)
    return [line for line, m in found if m and math.prod(map(int, m[1].split(","))) >= size]


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by name."""
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            words = line.split()
            name = " ".join(words[:2]) if words[0] == "ENTRY" else words[0]
            found[name] = []
        elif found:
            found[name].append(line.strip())
    return found


def _numbers(line: str) -> int:
    """How many numbers a line copies; 0 if it does something else."""
    copy = COPY.search(line)
    return math.prod(map(int, copy[1].split(","))) if copy else 0
