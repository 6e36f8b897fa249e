"""Repeated random spans: continue a span of random tokens that stood somewhere before.

What induction heads do (arXiv 2209.11895); nothing but copying helps, and the distance is random,
so that it cannot be learned as an offset.
"""

from collections.abc import Sequence

import numpy as np

from kvjax.example import Example
from kvjax.tasks.vocabulary import Vocabulary


def generate(
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
