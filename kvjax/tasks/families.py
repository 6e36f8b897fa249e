"""Families of problems as training and test data that share no query."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from kvjax.tasks import programs, word_problems
from kvjax.tasks.prompt import Problem
from kvjax.tasks.words import WordVocabulary

FAMILIES: dict[str, tuple[Callable[..., Problem], tuple[int, ...]]] = {
    "word_problems": (word_problems.generate, (1, 2, 1, 2, 3)),
    "programs": (programs.generate, tuple(range(programs.COMMANDS[0], programs.COMMANDS[1] + 1))),
}
"""The generator of each family, and the difficulties that its data takes in turn."""

SPLITS = ("train", "test")
TEST_SHARE = 8
"""One query in so many belongs to the tests, whatever the seed."""


def split_of(query: str) -> str:
    """Which split a query belongs to: a checksum decides, so that no query is in both."""
    return SPLITS[zlib.crc32(query.encode()) % TEST_SHARE == 0]


def problems(
    family: str,
    count: int,
    seed: int,
    split: str = "train",
    difficulties: tuple[int, ...] | None = None,
) -> list[Problem]:
    """Different problems; more of them begin with the same ones.

    Args:
        difficulties: levels or numbers of commands, in turn; None for all of the family's.

    Raises:
        ValueError: an unknown family or split.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    generate, every = FAMILIES[family]
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(family.encode())])
    vocab, found = WordVocabulary(), {}
    turns = every if difficulties is None else difficulties
    while len(found) < count:
        problem = generate(rng, vocab, turns[len(found) % len(turns)])
        if split_of(problem.query) == split:
            found.setdefault(problem.query, problem)
    return list(found.values())


def rows(family: str, count: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """`problems` as rows of fine-tuning data: {"query": …, "response": …}."""
    return [
        {"query": problem.query, "response": problem.response}
        for problem in problems(family, count, seed, split)
    ]
