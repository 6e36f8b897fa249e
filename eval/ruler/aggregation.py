"""RULER's aggregation: the most frequent words of a list or of a coded text (section 3.3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from eval.ruler.text import Prompt
from kvjax.tasks.english import POOL, words_of
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text import ids_after

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
    solved = f"{INTRO}{_numbered(first)}{QUESTION} {ANSWER} {' '.join(example[:shown])}.\n\n"

    def text(count: int) -> str:
        return _numbered(_shuffled([*common * often, *other[:count]], seed))

    frame = f"{solved}{INTRO}", QUESTION, ANSWER
    count = _count_of(vocab, text, len(other), length, frame)
    return _exactly(vocab, length, frame, text(count), tuple(common))


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
        return " ".join(_shuffled(said, seed))

    frame = (
        "Below is a coded text, in which dots are blanks. Remember the coded words that occur most "
        "often.\n\n",
        f"\n\nQuestion: Which {ASKED} coded words occur most often in the text above?",
        f"Answer: The {ASKED} coded words that occur most often are",
    )
    # The asked words must differ in number from each other and from the next word.
    count = _count_of(vocab, text, length, length, frame)
    found = _shares(count, len(words))[1 : ASKED + 2]
    if len(set(found)) <= ASKED:
        raise ValueError(
            f"got length {length}, too short for words of different numbers: {found}, "
            f"expected {ASKED + 1} different ones"
        )
    return _exactly(vocab, length, frame, text(count), tuple(words[1 : ASKED + 1]))


INTRO = (
    "Below is a numbered list of words, some of which occur more often than the others. Remember "
    "those.\n\n"
)
QUESTION = f"\n\nQuestion: Which {COMMON} words occur most often in the list above?"
ANSWER = f"Answer: The {COMMON} words that occur most often are"


def _numbered(entries: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _shares(count: int, ranks: int) -> list[int]:
    zeta = math.pi**2 / 6  # ζ(2)
    return [int(count * rank**-EXPONENT / zeta) for rank in range(1, ranks + 1)]


def _shuffled(words: Sequence[str], seed: int) -> list[str]:
    return [words[int(i)] for i in np.random.default_rng(seed).permutation(len(words))]


def _count_of(
    vocab: TokenizerVocabulary,
    text: Callable[[int], str],
    most: int,
    length: int,
    frame: tuple[str, str, str],
) -> int:
    """Largest count whose text fits into `length` tokens, by bisection."""
    room = length - sum(map(len, vocab.around(*frame)))
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if len(vocab.encode(text(middle))) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _exactly(
    vocab: TokenizerVocabulary,
    length: int,
    frame: tuple[str, str, str],
    text: str,
    answers: tuple[str, ...],
) -> Prompt:
    """Exactly `length` ids: the text in its frame, after line ends that fill the length.

    Args:
        frame: the instruction, the question, and the beginning of the answer.

    Raises:
        ValueError: the text and its frame have more than `length` tokens.
    """
    before, after = vocab.around(*frame)
    ids = vocab.encode(text)
    left = length - len(before) - len(ids) - len(after)
    if left < 0:
        raise ValueError(f"got length {length}, expected ≥ {length - left} for the words alone")
    pad = (ids_after(vocab.tokenizer, "\n") or vocab.encode("."))[-1]
    return Prompt((*before, *[pad] * left, *ids, *after), answers, len(after))
