"""RULER's variable tracking: which names have a value, through four hops (section 3.2)."""

from __future__ import annotations

import numpy as np

from eval.ruler.text import Prompt, compose, noise
from kvjax.tasks.words import TokenizerVocabulary

HOPS = 4
NAME_LENGTH = 5
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
INTRO = "Remember which variables have which values in the text below.\n\n"


def generate(rng: np.random.Generator, vocab: TokenizerVocabulary, length: int) -> Prompt:
    """One prompt of exactly `length` tokens: an example without haystack, then the chain to track.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    names, value = _names(rng, 2 * (HOPS + 1)), str(rng.integers(10**4, 10**5))
    shown, asked = names[: HOPS + 1], names[HOPS + 1 :]
    other = str((int(value) + 12345) % 90000 + 10000)
    example = f"{' '.join(_chain(shown, other))}{_question(other)} {' '.join(shown)}.\n\n"
    ids = compose(
        rng,
        vocab,
        length,
        f"{INTRO}{example}{INTRO}",
        _chain(asked, value),
        _question(value),
        noise(vocab),
        in_order=True,
    )
    return Prompt(ids, tuple(asked))


def _names(rng: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(LETTERS, NAME_LENGTH))] = None
    return list(found)


def _chain(names: list[str], value: str) -> list[str]:
    values = [value, *(f"the value of {name}" for name in names)]
    return [f"Set {name} to {given}." for name, given in zip(names, values, strict=False)]


def _question(value: str) -> str:
    return (
        f"\n\nQuestion: Which variables have the value {value}, directly or through others?\n"
        f"Answer: The {HOPS + 1} variables with the value {value} are"
    )
