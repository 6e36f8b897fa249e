"""Questions about long prompts: find a fact, compare two, or continue a span seen before."""

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
"""First number of the seeds of evaluation; pretraining's seeds begin with the recipe's seed."""


@dataclass(frozen=True)
class Task:
    """A task of long prompts.

    Attributes:
        generate: (rng, vocab, length, answer_length, …) → one `Example`.
        chance: share of right answers of a model that copies one of the candidates without knowing
            which. Of a needle there is only one candidate, so a model that finds any favorite thing
            is right. 0 where there are no candidates.
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
    """One prompt of exactly `length` tokens; the question is its end.

    Args:
        length: tokens of the prompt, question and beginning-of-sequence token included;
            None for the shortest one, without filler.
        answer_length: words of the answer.
        distractors: facts about other people, with answers of the same length; more than none
            makes it the multi-key task.
        depth: where the fact stands, 0 to 1; None for a random place.
        filler: makes the text around the facts; None for the generated one.

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
    """One prompt of exactly `length` tokens; `span` is the older person's favorite thing.

    Who guesses between the two candidates is right half of the time.

    Args:
        length: tokens of the prompt, question and beginning-of-sequence token included;
            None for the shortest one, without filler.
        answer_length: words of both candidates' things.
        distractors: further people, with age and favorite thing.
        depth: where the answer's sentence stands, 0 to 1; None for a random place.
        filler: makes the text around the facts; None for the generated one.

    Raises:
        ValueError: `length` cannot hold the facts and the question.
    """
    cast = draw_people(rng, [answer_length] * (2 + distractors))
    right = older(cast[0], cast[1])
    question = vocab.encode(ask_thing_of_older(cast[0], cast[1]))
    likes = [vocab.encode(person.likes()) for person in cast]
    ages = [vocab.encode(person.is_old()) for person in cast]
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
    """Random tokens that end with the first `cue_length` tokens of a span they contain.

    Args:
        length: tokens of the prompt, cue and beginning-of-sequence token included; None for
            the span and the cue alone.
        answer_length: tokens of the span after the cue: the answer.
        depth: where the span stands, 0 to 1; None for a random place.
        ids: what is drawn from; None for all but the first four, the special tokens of the
            project's vocabulary.

    Raises:
        ValueError: `length` cannot hold the span and the cue.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    span_length = cue_length + answer_length
    shortest = len(start) + span_length + cue_length
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest}")
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
    """Examples of one of TASKS, with answers of random lengths.

    Args:
        length: tokens of every prompt.
        answer_lengths: least and largest number of words of the answers.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    rng = np.random.default_rng([EVALUATION_STREAM, seed, length])
    low, high = answer_lengths
    return [
        TASKS[task].generate(rng, vocab, length, int(rng.integers(low, high + 1)))
        for _ in range(count)
    ]


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


def draw_people(rng: np.random.Generator, thing_lengths: Sequence[int]) -> list[Person]:
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
