"""A toy language: programs that rearrange a row of things, and its interpreter.

Every command ends with a full stop. X and Y stand for things, one word each:

    leaves X .      the first X goes away
    calls X .       one more X at the end; any X that stood in the row at the start
    follows X Y .   the first X moves to the place right behind the first Y
    paints X Y .    the first X becomes Y
    closes .        the row is turned around
    opens .         the row is emptied
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvjax.tasks import words

ARGUMENTS = {"leaves": 1, "calls": 1, "follows": 2, "paints": 2, "closes": 0, "opens": 0}
"""How many things follow each command."""

_THINGS = frozenset(words.THINGS)

Command = tuple[str, ...]
"""The command's word, then its things."""


class ProgramError(ValueError):
    """A text is no program, or the program cannot run."""


def parse(text: str) -> list[Command]:
    """The commands of a program.

    Raises:
        ProgramError: an unknown command, the wrong number of things, a word that is no thing,
            or no full stop at the end.
    """
    program, said = [], []
    for word in text.split():
        if word == ".":
            program.append(_command(said))
            said = []
        else:
            said.append(word)
    if said:
        raise ProgramError(f"got {' '.join(said)!r} at the end, expected a full stop")
    return program


def _command(said: list[str]) -> Command:
    if not said or said[0] not in ARGUMENTS:
        raise ProgramError(f"got {' '.join(said)!r}, expected one of {', '.join(ARGUMENTS)}")
    name, *things = said
    if len(things) != ARGUMENTS[name]:
        raise ProgramError(f"{name} got {len(things)} words, expected {ARGUMENTS[name]}")
    for thing in things:
        if thing not in _THINGS:
            raise ProgramError(f"{name} got {thing!r}, expected a thing")
    return (name, *things)


def render(program: Sequence[Command]) -> str:
    """The text of a program."""
    return " ".join(f"{' '.join(command)} ." for command in program)


def run(program: Sequence[Command], start: Sequence[str]) -> list[str]:
    """The row after all commands.

    Raises:
        ProgramError: a command about a thing that is not there.
    """
    row = list(start)
    for name, *things in program:
        if name == "leaves":
            row.pop(_find(row, things[0]))
        elif name == "calls":
            _find(start, things[0])
            row.append(things[0])
        elif name == "follows":
            moved = row.pop(_find(row, things[0]))
            row.insert(_find(row, things[1]) + 1, moved)
        elif name == "paints":
            row[_find(row, things[0])] = things[1]
        elif name == "closes":
            row.reverse()
        else:
            row.clear()
    return row


def _find(row: Sequence[str], thing: str) -> int:
    if thing not in row:
        raise ProgramError(f"{thing} is not in the row {' '.join(row)}")
    return row.index(thing)


@dataclass(frozen=True)
class Effect:
    """Judges a program by the row it makes of `start`."""

    start: tuple[str, ...]
    wanted: tuple[str, ...]

    def __call__(self, text: str) -> bool:
        try:
            return tuple(run(parse(text), self.start)) == self.wanted
        except ProgramError:
            return False
