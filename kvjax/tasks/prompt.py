"""A prompt of an exact length: sentences that matter, strewn over filler, then the question."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvjax.tasks import filler as generated
from kvjax.tasks.vocabulary import Vocabulary

Filler = Callable[[np.random.Generator, int], list[list[int]]]
"""Sentences of exactly that many tokens in all, the last one cut."""


@dataclass(frozen=True)
class Context:
    """Token ids and the half-open span of each sentence that was placed, in the given order."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def strew(
    rng: np.random.Generator,
    vocab: Vocabulary,
    sentences: Sequence[Sequence[int]],
    length: int | None,
    question: Sequence[int] = (),
    depths: Sequence[float] | None = None,
    filler: Filler | None = None,
) -> Context:
    """Places sentences between the sentences of a filler text, and the question at its end.

    Args:
        sentences: token ids of each.
        length: tokens in all, the beginning-of-sequence token and the question included;
            None for no filler at all.
        question: token ids.
        depths: where each sentence stands, 0 (start) to 1 (end), to the nearest end of a filler
            sentence; None for random places.
        filler: makes the text around the sentences; None for the generated one.

    Raises:
        ValueError: sentences and question alone are longer than `length`.
    """
    start = [] if vocab.bos_id is None else [vocab.bos_id]
    shortest = len(start) + len(question) + sum(map(len, sentences))
    room = 0 if length is None else length - shortest
    if room < 0:
        raise ValueError(f"got length {length}, expected ≥ {shortest} for facts and question")
    pieces = generated.sentences(rng, vocab, room) if filler is None else filler(rng, room)
    places = rng.random(len(sentences)).tolist() if depths is None else depths
    ends = np.cumsum([0, *map(len, pieces)])
    gaps = [int(np.abs(ends - depth * room).argmin()) for depth in places]
    ids, spans = start, [(0, 0)] * len(sentences)
    for gap in range(len(pieces) + 1):
        for index in (i for i, g in enumerate(gaps) if g == gap):
            spans[index] = (len(ids), len(ids) + len(sentences[index]))
            ids = ids + list(sentences[index])
        if gap < len(pieces):
            ids = ids + pieces[gap]
    return Context((*ids, *question), tuple(spans))
