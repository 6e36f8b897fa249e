"""Small programs from instructions in words, judged by running them (see `row_language`).

the street is lantern violin copper . never violin , copper again . question : how is the street
today ? answer :
→ leaves violin . calls copper .
"""

from __future__ import annotations

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.problem import Problem, fits
from kvjax.tasks.row_language import Command, Effect, ProgramError, render, run
from kvjax.tasks.vocabulary import WordVocabulary

KINDS = ("told", "turned", "goal")
"""Instructions in the order of the program; in the opposite order; the row that is wanted."""

SHARES = (0.4, 0.2, 0.4)
"""How often each kind is drawn."""

COMMANDS = (2, 5)
ROW = (3, 5)
"""Least and largest numbers of commands, and of things in the row."""

WORDINGS = {
    "leaves": ("never {0}", "{0} never stays"),
    "calls": ("{0} again", "again one {0}"),
    "follows": ("{0} is behind {1}", "behind {1} is {0}"),
    "paints": ("{1} is over {0}", "over {0} is {1}"),
    "closes": ("the early is late", "late is early"),
}
"""What a command is called in an instruction."""

QUESTIONS = {
    "told": "how is the street today ?",
    "turned": "how is the street , late and early ?",
}


def generate(rng: np.random.Generator, vocab: WordVocabulary, commands: int = 2) -> Problem:
    """One problem; its reference program run backwards never gives what is wanted.

    Args:
        commands: of the reference program, 2 to 5.

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
        wanted = _result(program, start)
        if not wanted or wanted in (start, _result(program[::-1], start)):
            continue
        query = _query(rng, kind, program, start, wanted)
        problem = Problem(query, render(program), Effect(start, wanted), kind)
        if fits(vocab, problem):
            return problem


def _result(program: list[Command], start: tuple[str, ...]) -> tuple[str, ...]:
    """The row a program makes; none where it fails."""
    try:
        return tuple(run(program, start))
    except ProgramError:
        return ()


def _program(
    rng: np.random.Generator, kind: str, start: tuple[str, ...], others: list[str], commands: int
) -> list[Command]:
    """Random commands, each about another thing first; they may fail."""
    if kind == "goal":
        chosen = rng.integers(len(start), size=commands - 1)
        return [("opens",), *(("calls", start[i]) for i in chosen)]
    names = [list(WORDINGS)[i] for i in rng.integers(len(WORDINGS), size=commands)]
    if names.count("closes") > 1:  # would mostly undo each other
        return _program(rng, kind, start, others, commands)
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
