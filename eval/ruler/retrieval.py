"""RULER's retrieval (arXiv 2404.06654, section 3.1) and variable tracking (section 3.2).

Both scatter facts in a haystack: values of keys, or assignments of variables through four hops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.ruler.text import Prompt, compose, cut, noise, numbers_of, uuids_of, words_of
from kvjax.tasks.prompt import Filler
from kvjax.tasks.words import TokenizerVocabulary

BATCH = 256  # number of needles that a haystack of needles draws at a time


@dataclass(frozen=True)
class Needles:
    """One of the eight retrieval tasks.

    Attributes:
        haystack: a few sentences repeated, a text, or only needles with other keys.
        key, value: the form of keys and values.
        keys: number of keys; the prompt asks for `queries` of them.
        values: number of values of each key; the prompt asks for all.
    """

    haystack: Literal["noise", "essay", "needles"] = "essay"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    queries: int = 1
    values: int = 1


RETRIEVAL_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value="uuid"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(keys=4, queries=4),
}


def retrieval(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    task: Needles,
    text: Filler | None = None,
) -> Prompt:
    """One prompt of exactly `length` tokens that asks for values of keys.

    Args:
        text: the haystack of tasks with an essay; None: generated sentences.

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
        [_fact(kind, key, value) for key, value in pairs],
        _asked_for(kind, asked, len(answers)),
        fills[task.haystack],
    )
    return Prompt(ids, answers)


def _draw(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    draw = {"word": words_of, "number": numbers_of, "uuid": uuids_of}[kind]
    return draw(rng, count)


def _fact(kind: str, key: str, value: str) -> str:
    return f"One secret {kind} of {key} is {value}."


def _asked_for(kind: str, keys: list[str], answers: int) -> str:
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
        # No needle of the haystack may have a key that is asked for.
        used = set(taken)
        while True:
            keys = [key for key in _draw(rng, task.key, BATCH) if key not in used]
            used.update(keys)
            for key, value in zip(keys, _draw(rng, task.value, len(keys)), strict=True):
                yield vocab.encode(_fact(kind, key, value))

    return lambda rng, length: cut(sentences(rng), length)


HOPS = 4
NAME_LENGTH = 5
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
INTRO = "Remember which variables have which values in the text below.\n\n"


def tracking(rng: np.random.Generator, vocab: TokenizerVocabulary, length: int) -> Prompt:
    """One prompt of exactly `length` tokens that asks for the variables with a value.

    An example without haystack comes first, then the chain of assignments to track.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    names, value = _variables(rng, 2 * (HOPS + 1)), str(rng.integers(10**4, 10**5))
    shown, asked = names[: HOPS + 1], names[HOPS + 1 :]
    # Another number of five digits, for the example.
    other = str((int(value) + 12345) % 90000 + 10000)
    example = f"{' '.join(_chain(shown, other))}{_asked_value(other)} {' '.join(shown)}.\n\n"
    ids = compose(
        rng,
        vocab,
        length,
        f"{INTRO}{example}{INTRO}",
        _chain(asked, value),
        _asked_value(value),
        noise(vocab),
        in_order=True,
    )
    return Prompt(ids, tuple(asked))


def _variables(rng: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(LETTERS, NAME_LENGTH))] = None
    return list(found)


def _chain(names: list[str], value: str) -> list[str]:
    values = [value, *(f"the value of {name}" for name in names)]
    return [f"Set {name} to {given}." for name, given in zip(names, values, strict=False)]


def _asked_value(value: str) -> str:
    return (
        f"\n\nQuestion: Which variables have the value {value}, directly or through others?\n"
        f"Answer: The {HOPS + 1} variables with the value {value} are"
    )
