"""Filler from a text of the user's own: its sentences, in their order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvjax.paths import local_path
from kvjax.tasks.vocabulary import Vocabulary

SENTENCE_END = re.compile(r"""(?:(?<=[.!?…])|(?<=[.!?…]["'”’)]))\s+""")


@dataclass(frozen=True)
class Haystack:
    """A text as token ids; called, it is a `kvjax.tasks.prompt.Filler`.

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


def read(path: str | Path, vocab: Vocabulary) -> Haystack:
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
