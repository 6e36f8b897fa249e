"""What the tasks ask: long prompts of an exact length, and short problems with a judge.

A long prompt is a filler text with sentences that matter strewn over it, then the question. The
filler is made by a small grammar, or taken from a text of the user (`Haystack`).
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

Filler = Callable[[np.random.Generator, int], list[list[int]]]
"""Sentences of exactly that many tokens in all, the last one cut."""

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

SENTENCE_END = re.compile(r"""(?:(?<=[.!?…])|(?<=[.!?…]["'”’)]))\s+""")

LONGEST = 64
"""Tokens of a query and its response, <bos> and <eos> included."""


@dataclass(frozen=True)
class Context:
    """Token ids and the half-open span of each sentence that was placed, in the given order."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def strew(
    rng: np.random.Generator,
    vocab: Vocabulary,
    facts: Sequence[Sequence[int]],
    length: int | None,
    question: Sequence[int] = (),
    depths: Sequence[float] | None = None,
    filler: Filler | None = None,
) -> Context:
    """Places sentences between the sentences of a filler text, and the question at its end.

    Args:
        facts: token ids of each sentence to place.
        length: tokens in all, the beginning-of-sequence token and the question included;
            None for no filler at all.
        question: token ids.
        depths: where each sentence stands, 0 (start) to 1 (end), to the nearest end of a filler
            sentence; None for random places.
        filler: makes the text around the sentences; None for the generated one.

    Raises:
        ValueError: sentences and question alone are longer than `length`.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    shortest = len(start) + len(question) + sum(map(len, facts))
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest} for facts and question")
    pieces = sentences(rng, vocab, room) if filler is None else filler(rng, room)
    places = rng.random(len(facts)).tolist() if depths is None else depths
    ends = np.cumsum([0, *map(len, pieces)])
    gaps = [int(np.abs(ends - depth * room).argmin()) for depth in places]
    ids, spans = start, [(0, 0)] * len(facts)
    for gap in range(len(pieces) + 1):
        for index in (i for i, g in enumerate(gaps) if g == gap):
            spans[index] = (len(ids), len(ids) + len(facts[index]))
            ids = ids + list(facts[index])
        if gap < len(pieces):
            ids = ids + pieces[gap]
    return Context((*ids, *question), tuple(spans))


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


@dataclass(frozen=True)
class Haystack:
    """A text as token ids; called, it is a `Filler`.

    Attributes:
        name: of the file, for messages.
        pieces: ids of each sentence.
    """

    name: str
    pieces: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens of the whole text."""
        return sum(map(len, self.pieces))

    def __call__(self, rng: np.random.Generator, length: int) -> list[list[int]]:
        """Sentences that follow each other, from a random one on; the last is cut.

        Raises:
            ValueError: the text is shorter than `length` tokens.
        """
        sizes = np.cumsum([len(piece) for piece in self.pieces][::-1])[::-1]  # from each to the end
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
    """The haystack in a text file, UTF-8.

    Raises:
        ValueError: no such file, a URL, not UTF-8, or nothing in it.
    """
    path = local_path(path, "the haystack")
    if not path.is_file():
        raise ValueError(f"no haystack file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the haystack {path} is not UTF-8 text: {error}") from None
    sentences = SENTENCE_END.split(" ".join(text.split()))
    pieces = tuple(tuple(vocab.encode(sentence)) for sentence in sentences if sentence)
    return Haystack(path.name, tuple(piece for piece in pieces if piece))


@dataclass(frozen=True)
class Problem:
    """A query, a response that is right, and the judge of all others.

    Attributes:
        query: text that ends with "answer :".
        response: the reference, as training shows it.
        check: whether a text solves the problem; false for anything it cannot read.
        kind: the kind of problem within its family.
    """

    query: str
    response: str
    check: Callable[[str], bool]
    kind: str

    def solved(self, text: str) -> bool:
        """Whether a model's text solves the problem."""
        return self.check(text)


def fits(vocab: WordVocabulary, problem: Problem) -> bool:
    """Whether query and response have at most LONGEST tokens.

    Raises:
        ValueError: the vocabulary lacks a word of them.
    """
    text = f"{problem.query} {problem.response}"
    ids = vocab.encode(text)
    if vocab.unknown_id in ids:
        missing = sorted(
            {word for word in text.split() if vocab.encode(word) == [vocab.unknown_id]}
        )
        raise ValueError(f"the vocabulary lacks the words {', '.join(missing)}")
    return len(ids) + 2 <= LONGEST
