"""Parts of all of RULER's prompts: facts between the sentences of a haystack, and haystacks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tasks.english import sentence
from kvjax.tasks.prompt import Filler, sentences, strew
from kvjax.tasks.words import TokenizerVocabulary

NOISE = 4  # number of sentences that a haystack of noise repeats


@dataclass(frozen=True)
class Prompt:
    """A generated prompt.

    Attributes:
        ids: token ids.
        answers: the texts that the answer should contain.
        question_length: tokens of the question and the beginning of the answer, at the end.
    """

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    question_length: int


def compose(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    frame: tuple[str, str, str],
    facts: Sequence[str],
    answers: tuple[str, ...],
    fill: Filler | None = None,
    in_order: bool = False,
) -> Prompt:
    """Exactly `length` ids: the instruction, facts scattered in a haystack, the question.

    Args:
        frame: the instruction, the question, and the beginning of the answer.
        fill: makes the haystack; None: generated sentences.
        in_order: keep the order of the facts; otherwise each has a random place.

    Raises:
        ValueError: they do not fit, or the haystack's text is too short.
    """
    before, after = vocab.around(*frame)
    depths = rng.random(len(facts))
    depths = (np.sort(depths) if in_order else depths).tolist()
    fill = fill or functools.partial(sentences, vocab=vocab, say=sentence)
    context = strew(rng, list(map(vocab.encode, facts)), length, before, after, depths, fill)
    return Prompt(context.ids, answers, len(after))


def noise(vocab: TokenizerVocabulary) -> Filler:
    """A haystack of a few repeated sentences."""

    def fill(rng: np.random.Generator, length: int) -> list[list[int]]:
        said = [vocab.encode(sentence(rng)) for _ in range(NOISE)]
        return cut(itertools.cycle(said), length)

    return fill


def cut(pieces: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """The first pieces with `length` tokens in all; the last one is cut to fit.

    Raises:
        ValueError: the pieces have fewer tokens.
    """
    found: list[list[int]] = []
    left = length
    for piece in pieces:
        if left <= 0:
            break
        found.append(list(piece[:left]))
        left -= len(found[-1])
    if left > 0:
        raise ValueError(f"{length - left} tokens of text around the facts, expected ≥ {length}")
    return found
