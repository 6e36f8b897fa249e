"""RULER's retrieval (arXiv 2404.06654, section 3.1) and variable tracking (section 3.2).

Both scatter facts in a haystack: values of keys, or assignments of variables through four hops. The
needles are those of `kvjax.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from eval.ruler.text import Prompt, compose, cut, noise
from kvjax.tasks.english import ENGLISH
from kvjax.tasks.language import Needles
from kvjax.tasks.prompt import Filler
from kvjax.tasks.recall import hide
from kvjax.tasks.words import TokenizerVocabulary

BATCH = 256  # number of needles that a haystack of needles draws at a time


class Retrieval(NamedTuple):
    """One of the eight retrieval tasks.

    Attributes:
        haystack: a few sentences repeated, a text, or only needles with other keys.
        needles: what is hidden and asked for.
    """

    haystack: Literal["noise", "essay", "needles"] = "essay"
    needles: Needles = Needles()


RETRIEVAL_TASKS = {
    "niah_single_1": Retrieval("noise"),
    "niah_single_2": Retrieval(),
    "niah_single_3": Retrieval(needles=Needles(value="uuid")),
    "niah_multikey_1": Retrieval(needles=Needles(keys=4)),
    "niah_multikey_2": Retrieval("needles"),
    "niah_multikey_3": Retrieval("needles", Needles(key="uuid", value="uuid")),
    "niah_multivalue": Retrieval(needles=Needles(values=4)),
    "niah_multiquery": Retrieval(needles=Needles(keys=4, queries=4)),
}


def retrieval(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    task: Retrieval,
    text: Filler | None = None,
) -> Prompt:
    """One prompt of exactly `length` tokens that asks for values of keys.

    Args:
        text: the haystack of tasks with an essay; None: generated sentences.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    needles = task.needles
    facts = ENGLISH.facts(rng, needles)
    taken = {key for key, _ in facts}
    fills = {"noise": noise(vocab), "essay": text, "needles": _others(vocab, needles, taken)}
    # RULER's answers begin without the colon of `needle`.
    begun = ENGLISH.wording(needles).answer_prefix.removesuffix(":")
    example = hide(
        rng,
        vocab,
        length,
        ENGLISH,
        needles,
        facts,
        filler=fills[task.haystack],
        texts={"answer_prefix": begun},
    )
    return Prompt(example.prompt, example.answers, example.question_length)


def _others(vocab: TokenizerVocabulary, needles: Needles, taken: set[str]) -> Filler:
    """A haystack of needles with other keys than those that are taken."""
    needle, batch = ENGLISH.wording(needles).needle, replace(needles, keys=BATCH)

    def sentences(rng: np.random.Generator) -> Iterator[list[int]]:
        used = set(taken)
        while True:
            facts = [fact for fact in ENGLISH.facts(rng, batch) if fact[0] not in used]
            used.update(key for key, _ in facts)
            yield from vocab.encode_each([needle.format(key=key, value=v) for key, v in facts])

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
    example = " ".join([*_chain(shown, other), *_asked_value(other), *shown])
    frame = f"{INTRO}{example}.\n\n{INTRO}", *_asked_value(value)
    return compose(
        rng, vocab, length, frame, _chain(asked, value), tuple(asked), noise(vocab), in_order=True
    )


def _variables(rng: np.random.Generator, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(LETTERS, NAME_LENGTH))] = None
    return list(found)


def _chain(names: list[str], value: str) -> list[str]:
    values = [value, *(f"the value of {name}" for name in names)]
    return [f"Set {name} to {given}." for name, given in zip(names, values, strict=False)]


def _asked_value(value: str) -> tuple[str, str]:
    """The question, and the beginning of the answer."""
    return (
        f"\n\nQuestion: Which variables have the value {value}, directly or through others?",
        f"Answer: The {HOPS + 1} variables with the value {value} are",
    )
