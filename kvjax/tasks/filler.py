"""Filler: sentences of a small grammar that have nothing to do with any question."""

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.vocabulary import Vocabulary

SLOTS = {
    "N": words.FILLER_NOUNS,
    "A": words.FILLER_ADJECTIVES,
    "V": words.FILLER_VERBS,
    "M": words.FILLER_MOVES,
    "D": words.FILLER_ADVERBS,
    "P": words.FILLER_PREPOSITIONS,
}
"""What a capital letter in a pattern stands for."""

PATTERNS = (
    "the A N V the N .",
    "the N M P the A N .",
    "one A N D V the N .",
    "D , the N M P the N .",
    "the N is A and the N is A .",
    "a N V the A N P the N .",
)


def sentence(rng: np.random.Generator) -> str:
    """One random sentence."""
    parts = PATTERNS[rng.integers(len(PATTERNS))].split()
    draws = rng.random(len(parts))
    return " ".join(_fill(part, draw) for part, draw in zip(parts, draws, strict=True))


def _fill(part: str, draw: float) -> str:
    choices = SLOTS.get(part)
    return part if choices is None else choices[int(draw * len(choices))]


def sentences(rng: np.random.Generator, vocab: Vocabulary, length: int) -> list[list[int]]:
    """Sentences of `length` tokens in all; the last one is cut where they would exceed it."""
    pieces = []
    while length > 0:
        piece = vocab.encode(sentence(rng))[:length]
        pieces.append(piece)
        length -= len(piece)
    return pieces
