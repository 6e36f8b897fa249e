"""Parts of all of RULER's prompts: tokens of a text, words, haystacks."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvjax import data_files
from kvjax.tasks import words
from kvjax.tasks.prompt import SENTENCE_END, Filler, Haystack, sentence, strew
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text import ids_after

NOUNS = (*words.FILLER_NOUNS, *words.THINGS)
POOL = len(words.FILLER_ADJECTIVES) * len(NOUNS)
"""Number of different words."""

NOISE = 4  # number of sentences that a haystack of noise repeats


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the texts that the answer should contain."""

    ids: tuple[int, ...]
    answers: tuple[str, ...]


def encode(vocab: TokenizerVocabulary, text: str) -> list[int]:
    """Ids of a text that begins a prompt, without special tokens."""
    return vocab.tokenizer.encode(text, add_special_tokens=False)


def compose(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    intro: str,
    sentences: Sequence[str],
    question: str,
    fill: Filler | None,
    in_order: bool = False,
) -> tuple[int, ...]:
    """Exactly `length` ids: the instruction, sentences scattered in a haystack, the question.

    Args:
        in_order: keep the order of the sentences; otherwise each has a random place.

    Raises:
        ValueError: they do not fit, or the haystack's text is too short.
    """
    # The instruction stays first, at depth 0; only the sentences are scattered.
    depths = rng.random(len(sentences))
    context = strew(
        rng,
        vocab,
        [encode(vocab, intro), *map(vocab.encode, sentences)],
        length,
        ids_after(vocab.tokenizer, question),
        [0.0, *(np.sort(depths) if in_order else depths)],
        fill,
    )
    return context.ids


def words_of(rng: np.random.Generator, count: int) -> list[str]:
    """Different words, each an adjective and a noun.

    Raises:
        ValueError: more than POOL.
    """
    if count > POOL:
        raise ValueError(f"got {count} different words, expected ≤ {POOL}")
    picks = rng.choice(POOL, count, replace=False)
    pairs = [divmod(int(pick), len(NOUNS)) for pick in picks]
    return [f"{words.FILLER_ADJECTIVES[a]}-{NOUNS[n]}" for a, n in pairs]


def numbers_of(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return _different(lambda: str(rng.integers(10**6, 10**7)), count)


def uuids_of(rng: np.random.Generator, count: int) -> list[str]:
    """Different random UUIDs."""
    return _different(lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)), count)


def _different(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def essay(path: str | Path, vocab: TokenizerVocabulary) -> Haystack:
    """The haystack in a text file, plain or packed (.gz, .xz).

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    path = Path(path)
    sentences = SENTENCE_END.split(" ".join(data_files.read_text(path).split()))
    # A book has thousands of sentences, so all are encoded in one call instead of by vocab.encode.
    # vocab.encode puts a space before a text, except where the tokenizer does this itself.
    space = "" if encode(vocab, "a") == vocab.encode("a") else " "
    texts = [space + sentence for sentence in sentences if sentence]
    pieces = vocab.tokenizer(texts or [" "], add_special_tokens=False)
    return Haystack(path.name, tuple(tuple(p) for p in pieces["input_ids"] if p))


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
