"""Needle in a haystack: recall one person's favorite thing from a long prompt."""

import numpy as np

from kvjax.example import Example
from kvjax.tasks import people
from kvjax.tasks.prompt import Filler, strew
from kvjax.tasks.vocabulary import Vocabulary


def generate(
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
    cast = people.draw(rng, [answer_length] * (1 + distractors))
    question = vocab.encode(people.ask_thing(cast[0]))
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
