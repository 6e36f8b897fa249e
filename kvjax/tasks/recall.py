"""Tasks of long prompts: find a fact, compare two facts, or continue a span that stood before.

`needle` asks for the favorite thing of one person. `two_hop` asks for the favorite thing of the
older of two people: the kind of example behind HeadKV-R2 (arXiv 2410.19258, section 3.1), with two
candidate sentences, the ages that decide between them, and a question that names neither. In
`repeated_spans` only copying helps, as induction heads do (arXiv 2209.11895).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.example import Example
from kvjax.tasks import words
from kvjax.tasks.prompt import Filler, strew
from kvjax.tasks.words import Vocabulary

EVALUATION_STREAM = 1_000_003
"""First number of the seeds of evaluation, so that they differ from those of pretraining."""


@dataclass(frozen=True)
class Task:
    """A task of long prompts.

    Attributes:
        generate: (rng, vocab, length, answer_length, …) → one `Example`.
        chance: the share of right answers if a model copies a random candidate. A needle has one
            candidate, so every model that finds a favorite thing is right. 0 without candidates.
    """

    generate: Callable[..., Example]
    chance: float = 0.0


def _needle(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int = 4,
    distractors: int = 0,
    depth: float | None = None,
    filler: Filler | None = None,
) -> Example:
    """One prompt of exactly `length` tokens that ends with the question.

    Args:
        length: tokens of the prompt, with the question and the beginning-of-sequence token;
            None for the shortest prompt, without filler.
        answer_length: words of the answer.
        distractors: number of facts about other people, with answers of the same length. With any,
            the task is called multi-key.
        depth: the place of the fact, 0 to 1; None for a random place.
        filler: makes the text around the facts; None for the grammar.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    cast = draw_people(rng, [answer_length] * (1 + distractors))
    question = vocab.encode(ask_thing(cast[0]))
    depths = rng.random(len(cast)).tolist()
    if depth is not None:
        depths[0] = depth
    facts = [vocab.encode(person.likes()) for person in cast]
    context = strew(rng, vocab, facts, length, question, depths, filler)
    return Example(
        prompt=context.ids,
        answer=tuple(vocab.encode(cast[0].thing)),
        span=context.spans[0],
        depth=depths[0],
        name="multi_key" if distractors else "needle",
        question_length=len(question),
    )


def _two_hop(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int = 4,
    distractors: int = 0,
    depth: float | None = None,
    filler: Filler | None = None,
) -> Example:
    """One prompt of exactly `length` tokens that ends with the question.

    The span of the example is the sentence with the favorite thing of the older person. A guess
    between the two candidates is right half of the time.

    Args:
        length: tokens of the prompt, with the question and the beginning-of-sequence token;
            None for the shortest prompt, without filler.
        answer_length: words of the favorite thing of each person.
        distractors: number of other people, each with an age and a favorite thing.
        depth: the place of the sentence with the answer, 0 to 1; None for a random place.
        filler: makes the text around the facts; None for the grammar.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    cast = draw_people(rng, [answer_length] * (2 + distractors))
    right = older(cast[0], cast[1])
    question = vocab.encode(ask_thing_of_older(cast[0], cast[1]))
    likes = [vocab.encode(person.likes()) for person in cast]
    ages = [vocab.encode(person.is_old()) for person in cast]
    # Every sentence has its own random place: first those with things, then those with ages.
    depths = rng.random(2 * len(cast)).tolist()
    answer_at = cast.index(right)
    if depth is not None:
        depths[answer_at] = depth
    context = strew(rng, vocab, [*likes, *ages], length, question, depths, filler)
    return Example(
        prompt=context.ids,
        answer=tuple(vocab.encode(right.thing)),
        span=context.spans[answer_at],
        depth=depths[answer_at],
        name="two_hop",
        question_length=len(question),
    )


def _repeated_spans(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int | None,
    answer_length: int = 4,
    cue_length: int = 4,
    depth: float | None = None,
    ids: Sequence[int] | None = None,
) -> Example:
    """Random tokens that end with the first `cue_length` tokens of a span among them.

    The distance to the span is random, so that it cannot be learned as an offset.

    Args:
        length: tokens of the prompt, with the cue and the beginning-of-sequence token; None for
            the span and the cue alone.
        answer_length: tokens of the span after the cue: the answer.
        depth: the place of the span, 0 to 1; None for a random place.
        ids: the tokens to draw from; None for all but the first four, which are the special tokens
            of `WordVocabulary`.

    Raises:
        ValueError: `length` cannot hold the span and the cue.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    span_length = cue_length + answer_length
    shortest = len(start) + span_length + cue_length
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest}")
    # A stretch of random tokens; its end repeats the start of a span within it.
    choices = np.arange(4, vocab.size) if ids is None else np.asarray(ids)
    text = choices[rng.integers(len(choices), size=room + span_length)].tolist()
    at = int(rng.integers(room + 1)) if depth is None else round(depth * room)
    span = text[at : at + span_length]
    first = len(start) + at
    return Example(
        prompt=(*start, *text, *span[:cue_length]),
        answer=tuple(span[cue_length:]),
        span=(first, first + span_length),
        depth=at / room if room else 0.0,
        name="repeated_spans",
        question_length=cue_length,
    )


needle = Task(_needle, 1.0)
two_hop = Task(_two_hop, 1 / 2)
repeated_spans = Task(_repeated_spans)

TASKS = {
    "needle": needle,
    "multi_key": Task(functools.partial(_needle, distractors=5), 1 / 6),
    "two_hop": two_hop,
    "two_hop_crowded": Task(functools.partial(_two_hop, distractors=3), 1 / 2),
    "repeated_spans": repeated_spans,
}


def make_examples(
    task: str,
    vocab: Vocabulary,
    count: int,
    length: int,
    seed: int = 0,
    answer_lengths: tuple[int, int] = (1, 12),
) -> list[Example]:
    """Examples of a task, with answers of random lengths.

    >>> [example] = make_examples("needle", WordVocabulary(), 1, length=256)

    Args:
        task: a name in TASKS.
        length: tokens of every prompt.
        answer_lengths: smallest and largest number of words of the answers.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    # The length is part of the seed: other lengths give other people and words.
    rng = np.random.default_rng([EVALUATION_STREAM, seed, length])
    low, high = answer_lengths
    return [
        TASKS[task].generate(rng, vocab, length, int(rng.integers(low, high + 1)))
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Person:
    """A person in a prompt; the favorite `thing` has one or more words."""

    name: str
    thing: str
    age: int

    def likes(self) -> str:
        """The sentence with the favorite thing."""
        return f"{self.name} 's favorite thing is {self.thing} ."

    def is_old(self) -> str:
        """The sentence with the age."""
        return f"{self.name} is {self.age} years old ."


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


def ask_thing(person: Person) -> str:
    """Asks for the favorite thing of a person (one hop)."""
    return f"question : what is the favorite thing of {person.name} ? answer :"


def ask_age(person: Person) -> str:
    """Asks for the age of a person (one hop)."""
    return f"question : how old is {person.name} ? answer :"


def ask_older(a: Person, b: Person) -> str:
    """Asks who of two people is older (a comparison)."""
    return f"question : who is the older one between {a.name} and {b.name} ? answer :"


def ask_thing_of_older(a: Person, b: Person) -> str:
    """Asks for the favorite thing of the older person (two hops)."""
    return (
        "question : what is the favorite thing of the older one between "
        f"{a.name} and {b.name} ? answer :"
    )
