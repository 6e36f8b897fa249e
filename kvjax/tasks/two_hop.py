"""Reasoning in a haystack: the favorite thing of the older of two people.

The kind of example behind HeadKV-R2 (arXiv 2410.19258, section 3.1): two candidate sentences, the
ages that decide between them, and a question that names neither answer nor person to look up.
"""

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
    cast = people.draw(rng, [answer_length] * (2 + distractors))
    right = people.older(cast[0], cast[1])
    question = vocab.encode(people.ask_thing_of_older(cast[0], cast[1]))
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
