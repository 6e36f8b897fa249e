"""What the language of a prompt decides: the texts of its questions, its keys, values and filler.

`kvjax.tasks.people` has the small language of the embedded model, `kvjax.tasks.english` English.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

TEXTS = ("instruction", "needle", "age", "question", "answer_prefix")
"""The texts of a `Wording`."""


@dataclass(frozen=True)
class Wording:
    """The texts of a kind of prompt, in their order; words in braces are placeholders.

    Attributes:
        instruction: before the long text; "" for none.
        needle: a sentence with the {value} of a {key}.
        age: a sentence with the {age} of a {key}; "" where the question does not depend on ages.
        question: after the long text. With ages it asks about the older one of {a} and {b},
            otherwise for the values of the {key}; several keys become one enumeration.
        answer_prefix: the beginning of the answer; in the chat template the assistant's turn
            begins with it.
        between: separates the instruction, the long text and the question.
    """

    needle: str
    question: str
    answer_prefix: str = ""
    instruction: str = ""
    age: str = ""
    between: str = "\n"

    @property
    def asked(self) -> tuple[str, ...]:
        """The placeholders of the question."""
        return ("a", "b") if self.age else ("key",)

    def with_texts(self, texts: Mapping[str, str]) -> Wording:
        """The wording with other texts, by their names.

        Raises:
            ValueError: an unknown name, a placeholder that is missing or has no meaning, or braces
                that do not match.
        """
        # Name → the placeholders that the text must have, and those that it may have.
        places = {
            "instruction": ((), self.asked),
            "needle": (("key", "value"), ()),
            "age": (("key", "age"), ()),
            "question": (self.asked, ()),
            "answer_prefix": ((), self.asked),
        }
        if not self.age:
            del places["age"]
        for name, text in texts.items():
            if name not in places:
                raise ValueError(f"got a text {name!r}, expected one of {', '.join(places)}")
            _check_placeholders(name, text, *places[name])
        return dataclasses.replace(self, **texts)

    def parts(self, **values: str) -> tuple[str, str, str]:
        """What stands before the long text, after it, and at the beginning of the answer."""
        before = self.instruction.format(**values) + self.between if self.instruction else ""
        return (
            before,
            self.between + self.question.format(**values),
            self.answer_prefix.format(**values),
        )


def _check_placeholders(name: str, text: str, needed: Iterable[str], allowed: Iterable[str]):
    known = [*needed, *allowed]
    listed = " and ".join(f"{{{place}}}" for place in known)
    try:
        found = [place for _, place, _, _ in string.Formatter().parse(text) if place is not None]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}: {error}") from None
    strange = [place for place in found if place not in known]
    if strange:
        raise ValueError(
            f"{name} is {text!r} with {{{strange[0]}}}, expected no placeholder but {listed}"
        )
    missing = [place for place in needed if place not in found]
    if missing:
        raise ValueError(f"{name} is {text!r} without {{{missing[0]}}}, expected {listed} in it")


@dataclass(frozen=True)
class Needles:
    """The facts that a needle prompt hides, and the ones that it asks for.

    Attributes:
        keys: number of keys.
        queries: number of keys whose values are asked for: the first ones.
        values: number of values of each key.
        key, value: kinds of keys and values; None for the language's.
        length: words or digits of a value; None for the language's.
    """

    keys: int = 1
    queries: int = 1
    values: int = 1
    key: str | None = None
    value: str | None = None
    length: int | None = None


Fact = tuple[str, str]
"""A key and one of its values."""


@dataclass(frozen=True)
class Person:
    """A person in a prompt; the favorite `thing` has one or more words."""

    name: str
    thing: str
    age: int


@dataclass(frozen=True)
class Language:
    """A language that prompts are written in.

    Attributes:
        name: for errors.
        sample: a tokenizer that can write this text can write the prompts.
        sentence: a random sentence of filler.
        facts: random facts in the order of their keys, each of which has `values` of them.
        wording: the texts of a prompt with needles.
        people: random people with different names, ages and things; one for each number of words
            in a thing, None for the language's number.
        two_hop: the texts of a prompt about the older of two people.
        lengths: smallest and largest length of the answers that `make_examples` draws; None for
            the language's own lengths.
        then_eos: whether the end of the sequence must follow the right text. A model that was
            trained on these prompts alone writes it; another model may write a full stop, or one
            more sentence.
    """

    name: str
    sample: str
    sentence: Callable[[np.random.Generator], str]
    facts: Callable[[np.random.Generator, Needles], list[Fact]]
    wording: Callable[[Needles], Wording]
    people: Callable[[np.random.Generator, list[int | None]], list[Person]]
    two_hop: Wording
    lengths: tuple[int, int] | None
    then_eos: bool
