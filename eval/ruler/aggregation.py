"""RULER's aggregation: the most frequent words of a list or of a coded text (section 3.3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from eval.ruler.text import POOL, Prompt, encode, words_of
from kvjax.tasks.words import TokenizerVocabulary

COMMON = 10
TIMES = (30, 3)  # of common and other words
TIMES_IN_SHORT = (6, 1)
SHORT = 4096  # tokens; prompts with fewer have TIMES_IN_SHORT
EXAMPLE = (COMMON, 3, 6)  # common words, how often, further words

EXPONENT = 2.0
ASKED = 3
WORD_LENGTH = 6
BLANK = "..."
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def common_words(rng: np.random.Generator, vocab: TokenizerVocabulary, length: int) -> Prompt:
    """A list in which ten words occur 30 times and others three times. Asked for: the ten words.

    Raises:
        ValueError: `length` cannot hold ten common words and the question.
    """
    often, seldom = TIMES_IN_SHORT if length < SHORT else TIMES
    shown, times, others = EXAMPLE
    drawn = words_of(rng, min(POOL, shown + others + COMMON + length // (2 * seldom) + 1))
    example, drawn = drawn[: shown + others], drawn[shown + others :]
    common, other = drawn[:COMMON], list(itertools.chain(*([w] * seldom for w in drawn[COMMON:])))
    # One seed for every count that the bisection tries, so texts differ in length only.
    seed = int(rng.integers(2**31))
    first = _shuffled([*example[:shown] * times, *example[shown:]], seed)
    before = f"{_list_task(first)} {' '.join(example[:shown])}.\n\n"

    def text(count: int) -> str:
        return before + _list_task(_shuffled([*common * often, *other[:count]], seed))

    count = _count_of(vocab, text, len(other), length)
    return Prompt(_exactly(vocab, text(count), length), tuple(common))


def frequent_words(rng: np.random.Generator, vocab: TokenizerVocabulary, length: int) -> Prompt:
    """A text in which the k-th made-up word occurs n k^−2 / ζ(2) times; the first is a blank.

    Asked for: the three most frequent words after the blank.

    Raises:
        ValueError: `length` is too short for their numbers to differ.
    """
    made: dict[str, None] = {BLANK: None}
    while len(made) < int(math.sqrt(length)) + 2:
        made["".join(rng.choice(LETTERS, WORD_LENGTH))] = None
    words, seed = list(made), int(rng.integers(2**31))

    def text(count: int) -> str:
        shares = zip(words, _shares(count, len(words)), strict=True)
        said = [word for word, times in shares for _ in range(times)]
        return (
            "Below is a coded text, in which dots are blanks. Remember the coded words that occur "
            f"most often.\n\n{' '.join(_shuffled(said, seed))}\n\n"
            f"Question: Which {ASKED} coded words occur most often in the text above?\n"
            f"Answer: The {ASKED} coded words that occur most often are"
        )

    count = _count_of(vocab, text, length, length)
    # The asked words must differ in number from each other and from the next word.
    found = _shares(count, len(words))[1 : ASKED + 2]
    if len(set(found)) <= ASKED:
        raise ValueError(
            f"got length {length}, too short for words of different numbers: {found}, "
            f"expected {ASKED + 1} different ones"
        )
    return Prompt(_exactly(vocab, text(count), length), tuple(words[1 : ASKED + 1]))


def _list_task(entries: Sequence[str]) -> str:
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    return (
        "Below is a numbered list of words, some of which occur more often than the others. "
        f"Remember those.\n\n{numbered}\n\n"
        f"Question: Which {COMMON} words occur most often in the list above?\n"
        f"Answer: The {COMMON} words that occur most often are"
    )


def _shares(count: int, ranks: int) -> list[int]:
    zeta = math.pi**2 / 6  # ζ(2)
    return [int(count * rank**-EXPONENT / zeta) for rank in range(1, ranks + 1)]


def _shuffled(words: Sequence[str], seed: int) -> list[str]:
    return [words[int(i)] for i in np.random.default_rng(seed).permutation(len(words))]


def _count_of(
    vocab: TokenizerVocabulary, text: Callable[[int], str], most: int, length: int
) -> int:
    """Largest count whose text fits into `length` tokens, by bisection."""
    room = length - (vocab.bos_id is not None)
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode(vocab, text(middle))) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _exactly(vocab: TokenizerVocabulary, text: str, length: int) -> tuple[int, ...]:
    """Exactly `length` ids: the text, with line ends before it that fill the length.

    Raises:
        ValueError: the text has more than `length` tokens.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    ids = encode(vocab, text)
    left = length - len(start) - len(ids)
    if left < 0:
        raise ValueError(f"got length {length}, expected ≥ {length - left} for the words alone")
    pad = (encode(vocab, "\n") or encode(vocab, "."))[-1]
    return (*start, *[pad] * left, *ids)
