"""Arithmetic word problems about ages, with the steps of their solution written out.

Numbers are single tokens from 10 to 69. "over" adds and "under" subtracts. A solution counts from
the first number in steps of ten, then adds the rest, so that most numbers are ten away from the
number before them:

    mary is 14 years old . john is 23 years over mary . question : how old is john ? answer :
    → john is 23 over mary : 14 24 34 37 . 37
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.prompt import Problem, fits
from kvjax.tasks.words import WordVocabulary

LOW, HIGH = int(words.AGES[0]), int(words.AGES[-1])
TENS = (10, 20, 30)

KINDS = ("over", "under", "together", "between", "chain")


@dataclass(frozen=True)
class Level:
    """How hard the problems of a level are.

    Attributes:
        kinds: some of KINDS.
        steps: the numbers that are added and subtracted.
        differences: the answers of "between".
        distractors: largest number of other people; with any, the sentences are shuffled.
    """

    kinds: tuple[str, ...]
    steps: tuple[int, ...]
    differences: tuple[int, ...]
    distractors: int


LEVELS = {
    1: Level(("over", "under"), TENS[:1], (), 0),
    2: Level(KINDS, TENS, (*TENS, 40, 50), 1),
    3: Level(KINDS, tuple(range(10, 30)), tuple(range(10, 50)), 2),
}


@dataclass(frozen=True)
class FinalNumber:
    """A judge of solutions: whether a text ends with the number, as the only word of its sentence.

    One full stop after the number is allowed.
    """

    number: int

    def __call__(self, text: str) -> bool:
        said = text.split()
        if said and said[-1] == ".":
            said.pop()
        return said[-2:] in ([str(self.number)], [".", str(self.number)])


def generate(rng: np.random.Generator, vocab: WordVocabulary, level: int = 1) -> Problem:
    """One problem. Its answer is not a number in the query, so that copying never solves it.

    Args:
        level: 1 to 3, see LEVELS.

    Raises:
        ValueError: no such level, or a vocabulary without the words.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level}, expected one of {', '.join(map(str, LEVELS))}")
    kinds = LEVELS[level].kinds
    kind = kinds[rng.integers(len(kinds))]
    while True:
        problem = _draw(rng, kind, LEVELS[level])
        # Other problems are drawn again.
        answer = problem.response.split()[-1]
        if fits(vocab, problem) and answer not in problem.query.split():
            return problem


def _draw(rng: np.random.Generator, kind: str, level: Level) -> Problem:
    names = [words.NAMES[i] for i in rng.permutation(len(words.NAMES))]
    steps, ages = _ages(rng, kind, level)
    if kind == "together":
        facts, question, solution = _together(rng, names, ages[0], steps[0])
    elif kind == "between":
        facts, question, solution = _between(rng, names, ages)
    else:
        facts, question, solution = _path(rng, names, steps, ages)
    if level.distractors:
        facts += _distractors(rng, names[3:], level.distractors + 1 - len(steps), ages)
        facts = [facts[i] for i in rng.permutation(len(facts))]
    query = " ".join([*facts, "question :", question, "answer :"])
    return Problem(query, solution, FinalNumber(int(solution.split()[-1])), kind)


def _ages(rng: np.random.Generator, kind: str, level: Level) -> tuple[list[int], list[int]]:
    """Signed steps, and the ages before the first step and after each step."""
    count = 2 if kind == "chain" else 1
    while True:
        sizes = rng.choice(level.differences if kind == "between" else level.steps, count)
        signs = {"under": -1, "chain": rng.choice((-1, 1), count)}.get(kind, 1)
        offsets = np.cumsum([0, *(sizes * signs)])
        # The first ages from which all ages have a token.
        low, high = LOW - offsets.min(), HIGH - offsets.max()
        if low <= high:
            ages = rng.integers(low, high + 1) + offsets
            return (sizes * signs).tolist(), ages.tolist()


def _path(
    rng: np.random.Generator, names: Sequence[str], steps: list[int], ages: list[int]
) -> tuple[list[str], str, str]:
    """Facts, question and solution that lead from the first age to the last, step by step."""
    facts, solution = [_is_old(names[0], ages[0])], []
    for index, step in enumerate(steps):
        one, other = names[index + 1], names[index]
        size, side = abs(step), "over" if step > 0 else "under"
        # A word that changes nothing: "over" and "under" decide.
        older = " older ," if step > 0 and rng.random() < 0.5 else ""
        facts.append(f"{one} is{older} {size} years {side} {other} .")
        solution.append(f"{one} is {size} {side} {other} : {_count(ages[index], step)} .")
    return facts, f"how old is {names[len(steps)]} ?", " ".join([*solution, str(ages[-1])])


def _together(
    rng: np.random.Generator, names: Sequence[str], one: int, other: int
) -> tuple[list[str], str, str]:
    """Facts, question and solution of a sum of two ages."""
    a, b = (one, other) if rng.random() < 0.5 else (other, one)
    facts = [_is_old(names[0], a), _is_old(names[1], b)]
    question = f"how old is {names[0]} and {names[1]} together ?"
    return facts, question, f"{a} and {b} : {_count(a, b)} . {a + b}"


def _between(
    rng: np.random.Generator, names: Sequence[str], ages: list[int]
) -> tuple[list[str], str, str]:
    """Facts, question and solution of a difference of two ages.

    The older person comes first in half of the questions.
    """
    a, b = ages if rng.random() < 0.5 else ages[::-1]
    facts = [_is_old(names[0], a), _is_old(names[1], b)]
    question = f"what years is between {names[0]} and {names[1]} ?"
    low, size = min(a, b), abs(a - b)
    return facts, question, f"between {low} and {low + size} : {_count(low, size)} . {size}"


def _count(start: int, step: int) -> str:
    """The numbers from `start` to `start + step`, in tens as far as possible."""
    sign = 1 if step > 0 else -1
    stops = [*range(start, start + step, 10 * sign), start + step]
    return " ".join(map(str, stops))


def _distractors(
    rng: np.random.Generator, names: Sequence[str], most: int, ages: list[int]
) -> list[str]:
    """Sentences with ages of one to `most` other people; the ages differ from those asked about."""
    # No other person has an age of the solution.
    free = [age for age in range(LOW, HIGH + 1) if age not in ages]
    count = int(rng.integers(1, most + 1)) if most else 0
    drawn = rng.choice(free, count, replace=False).tolist()
    return [_is_old(name, age) for name, age in zip(names, drawn, strict=False)]


def _is_old(name: str, age: int) -> str:
    return f"{name} is {age} years old ."
