"""RULER's retrieval: values of keys, hidden in a haystack (arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.ruler.text import Prompt, compose, cut, noise, numbers_of, uuids_of, words_of
from kvjax.tasks.prompt import Filler
from kvjax.tasks.words import TokenizerVocabulary

BATCH = 256  # needles of a haystack that are drawn at a time


@dataclass(frozen=True)
class Needles:
    """One of the eight retrieval tasks.

    Attributes:
        haystack: few sentences repeated, a text, or nothing but needles with other keys.
        key, value: what they look like.
        keys: of all facts; `queries` of them are asked for.
        values: of each key, all of them asked for.
    """

    haystack: Literal["noise", "essay", "needles"] = "essay"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    queries: int = 1
    values: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}


def generate(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    task: Needles,
    text: Filler | None = None,
) -> Prompt:
    """One prompt of exactly `length` tokens.

    Args:
        text: the haystack of tasks with an essay; None for generated sentences.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    keys = _draw(rng, task.key, task.keys)
    values = _draw(rng, task.value, task.keys * task.values)
    pairs = [(keys[i // task.values], value) for i, value in enumerate(values)]
    asked = keys[: task.queries]
    answers = tuple(value for key, value in pairs if key in asked)
    kind = "UUID" if task.value == "uuid" else task.value
    fills = {"noise": noise(vocab), "essay": text, "needles": _needles(vocab, task, kind, keys)}
    ids = compose(
        rng,
        vocab,
        length,
        f"Secret {kind}s are hidden in the text below. Keep them in mind: one or more of them will "
        "be asked for at its end.\n\n",
        [_sentence(kind, key, value) for key, value in pairs],
        _question(kind, asked, len(answers)),
        fills[task.haystack],
    )
    return Prompt(ids, answers)


def _draw(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    draw = {"word": words_of, "number": numbers_of, "uuid": uuids_of}[kind]
    return draw(rng, count)


def _sentence(kind: str, key: str, value: str) -> str:
    return f"One secret {kind} of {key} is {value}."


def _question(kind: str, keys: list[str], answers: int) -> str:
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    if answers == 1:
        return (
            f"\n\nQuestion: What is the secret {kind} of {names} in the text above?\n"
            f"Answer: The secret {kind} of {names} is"
        )
    return (
        f"\n\nQuestion: What are all the secret {kind}s of {names} in the text above?\n"
        f"Answer: The secret {kind}s of {names} are"
    )


def _needles(vocab: TokenizerVocabulary, task: Needles, kind: str, taken: list[str]) -> Filler:
    def sentences(rng: np.random.Generator) -> Iterator[list[int]]:
        used = set(taken)
        while True:
            keys = [key for key in _draw(rng, task.key, BATCH) if key not in used]
            used.update(keys)
            for key, value in zip(keys, _draw(rng, task.value, len(keys)), strict=True):
                yield vocab.encode(_sentence(kind, key, value))

    return lambda rng, length: cut(sentences(rng), length)
