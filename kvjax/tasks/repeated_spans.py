"""Repeated random spans: continue a span of random tokens that stood somewhere before.

What induction heads do (arXiv 2209.11895); nothing but copying helps, and the distance is random,
so that it cannot be learned as an offset.
"""

import numpy as np

from kvjax.example import Example
from kvjax.tasks.vocabulary import Vocabulary


def generate(
    rng: np.random.Generator,
    vocab: Vocabulary,
    length: int,
    answer_length: int = 4,
    cue_length: int = 4,
    first_id: int = 4,
) -> Example:
    """Random tokens that end with the first `cue_length` tokens of a span they contain.

    Args:
        length: tokens of the prompt, cue and beginning-of-sequence token included.
        answer_length: tokens of the span after the cue: the answer.
        first_id: ids below it (special tokens) are not drawn.

    Raises:
        ValueError: `length` cannot hold the span and the cue.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    span_length = cue_length + answer_length
    room = length - len(start) - span_length - cue_length
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {length - room}")
    text = rng.integers(first_id, vocab.size, room + span_length).tolist()
    at = int(rng.integers(room + 1))
    span = text[at : at + span_length]
    first = len(start) + at
    return Example(
        prompt=(*start, *text, *span[:cue_length]),
        answer=tuple(span[cue_length:]),
        span=(first, first + span_length),
        depth=at / room if room else 0.0,
        name="repeated_spans",
    )
