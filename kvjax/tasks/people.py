"""People, what they like and how old they are: the facts of the recall and reasoning tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tasks import words


@dataclass(frozen=True)
class Person:
    """A person of a prompt; `thing` is of one or more words."""

    name: str
    thing: str
    age: int

    def likes(self) -> str:
        """The sentence that says the favorite thing."""
        return f"{self.name} 's favorite thing is {self.thing} ."

    def is_old(self) -> str:
        """The sentence that says the age."""
        return f"{self.name} is {self.age} years old ."


def draw(rng: np.random.Generator, thing_lengths: Sequence[int]) -> list[Person]:
    """Random people of different names and ages.

    Words of things repeat only when all of them together need more than there are.

    Args:
        thing_lengths: words of each person's favorite thing.

    Raises:
        ValueError: more people than names.
    """
    count, total = len(thing_lengths), sum(thing_lengths)
    if count > len(words.NAMES):
        raise ValueError(f"got {count} people, expected ≤ {len(words.NAMES)}")
    names = rng.choice(len(words.NAMES), count, replace=False)
    ages = rng.choice(len(words.AGES), count, replace=False)
    things = rng.choice(len(words.THINGS), total, replace=total > len(words.THINGS))
    parts = np.split(things, np.cumsum(thing_lengths)[:-1])
    return [
        Person(words.NAMES[name], " ".join(words.THINGS[i] for i in part), int(words.AGES[age]))
        for name, part, age in zip(names, parts, ages, strict=True)
    ]


def older(a: Person, b: Person) -> Person:
    """The older one."""
    return a if a.age > b.age else b


def ask_thing(person: Person) -> str:
    """One hop: the favorite thing of a person."""
    return f"question : what is the favorite thing of {person.name} ? answer :"


def ask_age(person: Person) -> str:
    """One hop: the age."""
    return f"question : how old is {person.name} ? answer :"


def ask_older(a: Person, b: Person) -> str:
    """A comparison: who is older."""
    return f"question : who is the older one between {a.name} and {b.name} ? answer :"


def ask_thing_of_older(a: Person, b: Person) -> str:
    """Two hops: compare the ages, then look the favorite thing up."""
    return (
        "question : what is the favorite thing of the older one between "
        f"{a.name} and {b.name} ? answer :"
    )
