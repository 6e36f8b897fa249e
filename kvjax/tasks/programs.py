"""Small programs from instructions in words, judged by running them.

    the street is lantern violin copper . never violin , copper again . question : how is the
    street today ? answer :
    → leaves violin . calls copper .

A program rearranges a row of things. Every command ends with a full stop; X and Y are things, one
word each:

    leaves X .      removes the first X
    calls X .       adds an X at the end; X must be in the row at the start
    follows X Y .   moves the first X to the place right behind the first Y
    paints X Y .    replaces the first X by Y
    closes .        reverses the row
    opens .         empties the row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.prompt import Problem, fits
from kvjax.tasks.words import WordVocabulary

KINDS = ("told", "turned", "goal")
"""The query gives instructions in the order of the program, in reverse order, or the wanted row."""

SHARES = (0.4, 0.2, 0.4)
"""How often each kind is drawn."""

COMMANDS = (2, 5)
ROW = (3, 5)
"""Smallest and largest number of commands, and of things in the row."""

WORDINGS = {
    "leaves": ("never {0}", "{0} never stays"),
    "calls": ("{0} again", "again one {0}"),
    "follows": ("{0} is behind {1}", "behind {1} is {0}"),
    "paints": ("{1} is over {0}", "over {0} is {1}"),
    "closes": ("the early is late", "late is early"),
}
"""The wordings of each command in an instruction."""

QUESTIONS = {
    "told": "how is the street today ?",
    "turned": "how is the street , late and early ?",
}

ARGUMENTS = {"leaves": 1, "calls": 1, "follows": 2, "paints": 2, "closes": 0, "opens": 0}
"""How many things follow each command."""

_THINGS = frozenset(words.THINGS)

Command = tuple[str, ...]
"""The command's word, then its things."""


def generate(rng: np.random.Generator, vocab: WordVocabulary, commands: int = 2) -> Problem:
    """One problem. Its reference program in reverse order never gives the wanted row.

    Args:
        commands: number of commands in the reference program, 2 to 5.

    Raises:
        ValueError: too few or too many commands, or a vocabulary without the words.
    """
    low, high = COMMANDS
    if not low <= commands <= high:
        raise ValueError(f"commands is {commands}, expected {low} to {high}")
    kind = KINDS[rng.choice(len(KINDS), p=SHARES)]
    while True:
        things = [words.THINGS[i] for i in rng.permutation(len(words.THINGS))]
        size = int(rng.integers(max(ROW[0], commands), ROW[1] + 1))
        start, others = tuple(things[:size]), things[size:]
        program = _program(rng, kind, start, others, commands)
        # Draw again if the program fails, changes nothing, or gives the same row in reverse order.
        wanted = _result(program, start)
        if not wanted or wanted in (start, _result(program[::-1], start)):
            continue
        query = _query(rng, kind, program, start, wanted)
        problem = Problem(query, render(program), Effect(start, wanted), kind)
        if fits(vocab, problem):
            return problem


def _result(program: list[Command], start: tuple[str, ...]) -> tuple[str, ...]:
    """The row that a program makes of `start`; empty if the program fails."""
    try:
        return tuple(run(program, start))
    except ProgramError:
        return ()


def _program(
    rng: np.random.Generator, kind: str, start: tuple[str, ...], others: list[str], commands: int
) -> list[Command]:
    """Random commands, each with another first thing. The program may fail when it runs."""
    if kind == "goal":
        chosen = rng.integers(len(start), size=commands - 1)
        return [("opens",), *(("calls", start[i]) for i in chosen)]
    names = [list(WORDINGS)[i] for i in rng.integers(len(WORDINGS), size=commands)]
    if names.count("closes") > 1:  # two reversals mostly undo each other
        return _program(rng, kind, start, others, commands)
    # Every command gets another thing of the row first; `paints` takes its second from outside.
    program, order = [], rng.permutation(len(start))
    for name, first in zip(names, order, strict=False):
        second = (first + rng.integers(1, len(start))) % len(start)
        a, b = start[first], start[second]
        things = {"leaves": (a,), "calls": (a,), "follows": (a, b), "closes": ()}
        program.append((name, *things.get(name, (a, others.pop()))))
    return program


def _query(
    rng: np.random.Generator,
    kind: str,
    program: list[Command],
    start: tuple[str, ...],
    wanted: tuple[str, ...],
) -> str:
    street = f"the street is {' '.join(start)} ."
    if kind == "goal":
        return f"{street} soon the street is {' '.join(wanted)} . question : how ? answer :"
    clauses = [
        WORDINGS[name][rng.integers(len(WORDINGS[name]))].format(*things)
        for name, *things in (program if kind == "told" else program[::-1])
    ]
    return f"{street} {' , '.join(clauses)} . question : {QUESTIONS[kind]} answer :"


class ProgramError(ValueError):
    """A text that is not a program, or a program that cannot run."""


def parse(text: str) -> list[Command]:
    """The commands of a program.

    Raises:
        ProgramError: an unknown command, the wrong number of things, a word that is not a thing,
            or a missing full stop at the end.
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
        ProgramError: a command with a thing that is not in the row.
    """
    row = list(start)
    for name, *things in program:
        if name == "leaves":
            row.pop(_find(row, things[0]))
        elif name == "calls":
            _find(start, things[0])  # fails for things that are not in the row at the start
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
    """A judge of programs: whether a text is a program that makes `wanted` of `start`."""

    start: tuple[str, ...]
    wanted: tuple[str, ...]

    def __call__(self, text: str) -> bool:
        try:
            return tuple(run(parse(text), self.start)) == self.wanted
        except ProgramError:
            return False
