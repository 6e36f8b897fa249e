"""Long prompts of an exact length, and short problems with a judge.

A long prompt is a filler text with facts between its sentences, then the question. The filler comes
from a small grammar, or from a text of the user (`Haystack`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvjax.paths import local_path
from kvjax.tasks import words
from kvjax.tasks.words import Vocabulary, WordVocabulary
from kvjax.text_files import read_text

Filler = Callable[[np.random.Generator, int], list[list[int]]]
"""(rng, length) → token ids of sentences, `length` tokens in total; the last sentence is cut."""

SLOTS = {
    "N": words.FILLER_NOUNS,
    "A": words.FILLER_ADJECTIVES,
    "V": words.FILLER_VERBS,
    "M": words.FILLER_MOVES,
    "D": words.FILLER_ADVERBS,
    "P": words.FILLER_PREPOSITIONS,
}
"""The words that a capital letter in a pattern can become."""

PATTERNS = (
    "the A N V the N .",
    "the N M P the A N .",
    "one A N D V the N .",
    "D , the N M P the N .",
    "the N is A and the N is A .",
    "a N V the A N P the N .",
)

SENTENCE_END = re.compile(r"""(?:(?<=[.!?…])|(?<=[.!?…]["'”’)]))\s+""")

LONGEST = 64
"""Largest number of tokens in a query and its response, with <bos> and <eos>."""


@dataclass(frozen=True)
class Context:
    """Token ids of a prompt, and the half-open span of each fact, in the order they were given."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def strew(
    rng: np.random.Generator,
    facts: Sequence[Sequence[int]],
    length: int | None,
    before: Sequence[int],
    after: Sequence[int],
    depths: Sequence[float] | None,
    filler: Filler,
) -> Context:
    """Places facts between the sentences of a filler text.

    Args:
        facts: token ids of each fact.
        length: tokens of the whole prompt; None for a prompt without filler.
        before: token ids that begin the prompt: <bos>, the chat template, an instruction.
        after: token ids that end it: the question and the beginning of the answer.
        depths: the place of each fact, 0 (start) to 1 (end), moved to the nearest end of a filler
            sentence; None for random places.
        filler: makes the text around the facts.

    Raises:
        ValueError: `length` cannot hold the facts and what stands before and after.
    """
    shortest = len(before) + len(after) + sum(map(len, facts))
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest} for facts and question")
    pieces = filler(rng, room)
    places = rng.random(len(facts)).tolist() if depths is None else depths
    # Facts go between filler sentences: the gap that is nearest to each depth.
    ends = np.cumsum([0, *map(len, pieces)])
    gaps = [int(np.abs(ends - depth * room).argmin()) for depth in places]
    ids, spans = list(before), [(0, 0)] * len(facts)
    # Facts with the same gap keep their order.
    for gap in range(len(pieces) + 1):
        for index in (i for i, g in enumerate(gaps) if g == gap):
            spans[index] = (len(ids), len(ids) + len(facts[index]))
            ids += facts[index]
        if gap < len(pieces):
            ids += pieces[gap]
    return Context((*ids, *after), tuple(spans))


def sentence(rng: np.random.Generator) -> str:
    """One random sentence of the grammar."""
    parts = PATTERNS[rng.integers(len(PATTERNS))].split()
    draws = rng.random(len(parts))
    return " ".join(_fill(part, draw) for part, draw in zip(parts, draws, strict=True))


def _fill(part: str, draw: float) -> str:
    choices = SLOTS.get(part)
    return part if choices is None else choices[int(draw * len(choices))]


def sentences(
    rng: np.random.Generator,
    length: int,
    vocab: Vocabulary,
    say: Callable[[np.random.Generator], str] = sentence,
) -> list[list[int]]:
    """Random sentences, `length` tokens in total; the last sentence is cut.

    Args:
        say: makes a sentence.
    """
    pieces = []
    while length > 0:
        piece = vocab.encode(say(rng))[:length]
        pieces.append(piece)
        length -= len(piece)
    return pieces


@dataclass(frozen=True)
class Haystack:
    """A text of the user, as token ids. It is a `Filler`: call it for a part of the text.

    Attributes:
        name: name of the file, for errors.
        pieces: token ids of each sentence.
    """

    name: str
    pieces: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens of the whole text."""
        return sum(map(len, self.pieces))

    def __call__(self, rng: np.random.Generator, length: int) -> list[list[int]]:
        """Consecutive sentences from a random one; the last sentence is cut.

        Raises:
            ValueError: the text is shorter than `length` tokens.
        """
        # Tokens from each sentence to the end: only early sentences leave enough.
        sizes = np.cumsum([len(piece) for piece in self.pieces][::-1])[::-1]
        starts = int((sizes >= length).sum())
        if starts == 0:
            raise ValueError(
                f"the haystack {self.name} has {self.size} tokens, expected ≥ {length}"
            )
        result, at = [], int(rng.integers(starts))
        while length > 0:
            result.append(list(self.pieces[at][:length]))
            length -= len(result[-1])
            at += 1
        return result


def read_haystack(path: str | Path, vocab: Vocabulary) -> Haystack:
    """Reads a haystack from a UTF-8 text file, plain or packed (.gz, .xz).

    Raises:
        ValueError: a missing or damaged file, a URL, or a text that is not UTF-8.
    """
    path = local_path(path, "the haystack")
    if not path.is_file():
        raise ValueError(f"no haystack file at {path}")
    found = [text for text in SENTENCE_END.split(" ".join(read_text(path).split())) if text]
    return Haystack(path.name, tuple(tuple(ids) for ids in vocab.encode_each(found) if ids))


@dataclass(frozen=True)
class Problem:
    """A query, a right response, and the judge of other responses.

    Attributes:
        query: text that ends with "answer :".
        response: the reference response, as training shows it.
        check: whether a text solves the problem; False for texts that it cannot read.
        kind: the kind of problem within its family.
    """

    query: str
    response: str
    check: Callable[[str], bool]
    kind: str

    def solved(self, text: str) -> bool:
        """Whether the text of a model solves the problem."""
        return self.check(text)


def fits(vocab: WordVocabulary, problem: Problem) -> bool:
    """Whether query and response have at most LONGEST tokens.

    Raises:
        ValueError: the vocabulary lacks a word of the query or the response.
    """
    text = f"{problem.query} {problem.response}"
    ids = vocab.encode(text)
    if vocab.unknown_id in ids:
        missing = sorted(
            {word for word in text.split() if vocab.encode(word) == [vocab.unknown_id]}
        )
        raise ValueError(f"the vocabulary lacks the words {', '.join(missing)}")
    return len(ids) + 2 <= LONGEST  # <bos> and <eos>
