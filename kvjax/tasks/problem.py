"""A question whose answer is judged by what it amounts to, not word by word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvjax.tasks.vocabulary import WordVocabulary

LONGEST = 64
"""Tokens of a query and its response, <bos> and <eos> included."""


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
