"""Families of short problems, as training and test data that have no query in common."""

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
"""The generator of each family, and the difficulties that its problems take in turn."""

SPLITS = ("train", "test")
TEST_SHARE = 8
"""One query in TEST_SHARE is a test query, with any seed."""


def split_of(query: str) -> str:
    """The split of a query. It depends on the text alone, so that no query is in both splits."""
    return SPLITS[zlib.crc32(query.encode()) % TEST_SHARE == 0]


def problems(
    family: str,
    count: int,
    seed: int,
    split: str = "train",
    difficulties: tuple[int, ...] | None = None,
) -> list[Problem]:
    """Problems with different queries. A larger `count` adds problems after the same first ones.

    Args:
        family: a name in FAMILIES.
        split: "train" or "test".
        difficulties: levels or numbers of commands that the problems take in turn; None: those of
            the family.

    Raises:
        ValueError: an unknown family or split.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    generate, every = FAMILIES[family]
    # Each family and split has its own random numbers.
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(family.encode())])
    vocab, found = WordVocabulary(), {}
    turns = every if difficulties is None else difficulties
    # Problems of the other split and repeated queries are thrown away.
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
