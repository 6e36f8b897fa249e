"""The language of the embedded model: people, their ages and favorite things.

Every word is a token of `kvjax.tasks.words`. The model was trained on these sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvjax.tasks import words
from kvjax.tasks.language import Fact, Language, Needles, Person, Wording
from kvjax.tasks.prompt import sentence

LIKES = "{key} 's favorite thing is {value} ."
IS_OLD = "{key} is {age} years old ."
ASKS_THING = "question : what is the favorite thing of {key} ?"
ASKS_THING_OF_OLDER = "question : what is the favorite thing of the older one between {a} and {b} ?"
ANSWER = "answer :"
THING_LENGTH = 4  # words of a favorite thing
THING_LENGTHS = (1, 12)


def draw_people(rng: np.random.Generator, thing_lengths: Sequence[int]) -> list[Person]:
    """Random people with different names and ages.

    Words of favorite things repeat only if the people need more words than there are.

    Args:
        thing_lengths: number of words in the favorite thing of each person.

    Raises:
        ValueError: more people than names.
    """
    count, total = len(thing_lengths), sum(thing_lengths)
    if count > len(words.NAMES):
        raise ValueError(f"got {count} people, expected ≤ {len(words.NAMES)}")
    names = rng.choice(len(words.NAMES), count, replace=False)
    ages = rng.choice(len(words.AGES), count, replace=False)
    things = rng.choice(len(words.THINGS), total, replace=total > len(words.THINGS))
    # The first words go to the first person, and so on.
    parts = np.split(things, np.cumsum(thing_lengths)[:-1])
    return [
        Person(words.NAMES[name], " ".join(words.THINGS[i] for i in part), int(words.AGES[age]))
        for name, part, age in zip(names, parts, ages, strict=True)
    ]


def older(a: Person, b: Person) -> Person:
    """The older of two people."""
    return a if a.age > b.age else b


def likes(person: Person) -> str:
    """The sentence with a person's favorite thing."""
    return LIKES.format(key=person.name, value=person.thing)


def is_old(person: Person) -> str:
    """The sentence with a person's age."""
    return IS_OLD.format(key=person.name, age=person.age)


def ask_thing(person: Person) -> str:
    """Asks for the favorite thing of a person (one hop)."""
    return f"{ASKS_THING.format(key=person.name)} {ANSWER}"


def ask_age(person: Person) -> str:
    """Asks for the age of a person (one hop)."""
    return f"question : how old is {person.name} ? {ANSWER}"


def ask_older(a: Person, b: Person) -> str:
    """Asks who of two people is older (a comparison)."""
    return f"question : who is the older one between {a.name} and {b.name} ? {ANSWER}"


def ask_thing_of_older(a: Person, b: Person) -> str:
    """Asks for the favorite thing of the older person (two hops)."""
    return f"{ASKS_THING_OF_OLDER.format(a=a.name, b=b.name)} {ANSWER}"


def facts(rng: np.random.Generator, needles: Needles) -> list[Fact]:
    """The favorite thing of each person.

    Raises:
        ValueError: several values or queries, or kinds of keys or values.
    """
    if needles.values > 1 or needles.queries > 1 or needles.key or needles.value:
        raise ValueError(
            f"got {needles} for a model whose tokenizer has the words of the embedded model only, "
            "expected one query, one value of each key, and no kinds"
        )
    length = needles.length or THING_LENGTH
    return [(person.name, person.thing) for person in draw_people(rng, [length] * needles.keys)]


def people(rng: np.random.Generator, lengths: list[int | None]) -> list[Person]:
    """`draw_people`; things have THING_LENGTH words where no number is given."""
    return draw_people(rng, [length or THING_LENGTH for length in lengths])


NEEDLE = Wording(LIKES, ASKS_THING, ANSWER, between=" ")

WORDS = Language(
    name="words",
    sample=f"{LIKES} {ASKS_THING} {ANSWER}".format(key="mary", value="velvet"),
    sentence=sentence,
    facts=facts,
    wording=lambda needles: NEEDLE,
    people=people,
    two_hop=Wording(LIKES, ASKS_THING_OF_OLDER, ANSWER, age=IS_OLD, between=" "),
    lengths=THING_LENGTHS,
    then_eos=True,
)
"""The language of models whose tokenizer has the words of `kvjax.tasks.words` alone."""
