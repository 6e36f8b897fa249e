"""Prompts in batches of fixed shapes: the same ones in every run, whatever is finished already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.encoding import Prompt
from eval.task import Item
from kvjax.prompts import bucket_length


@dataclass(frozen=True)
class Shape:
    """What programs are compiled for.

    Attributes:
        bucket: prompt tokens, padding included.
        max_new_tokens: of the answers.
        batch: sequences.
    """

    bucket: int
    max_new_tokens: int
    batch: int


@dataclass(frozen=True)
class Batch:
    """Prompts of one shape and one form that are read together, at most `shape.batch` of them.

    Attributes:
        seed: of its random numbers.
    """

    shape: Shape
    prompts: tuple[Prompt, ...]
    seed: int

    @property
    def chat(self) -> bool:
        """Whether its prompts are inside the chat template."""
        return self.prompts[0].chat

    @property
    def rows(self) -> list[list[int]]:
        """[shape.batch] ids, the first prompt again where there are no more."""
        missing = self.shape.batch - len(self.prompts)
        return [list(prompt.ids) for prompt in (*self.prompts, *self.prompts[:1] * missing)]


def make_batches(
    prompts: Sequence[Prompt], items: Sequence[Item], batch_size: int, seed: int = 0
) -> list[Batch]:
    """Batches of one bucket, longest answer and form (raw or chat), the largest bucket first.

    A bucket with fewer than `batch_size` prompts has batches as small as that, so that every shape
    is compiled once and what does not fit in memory shows at the start.

    Raises:
        ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected ≥ 1")
    by_shape: dict[tuple[int, int, bool], list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index)):
        new = items[prompt.index].max_new_tokens
        key = bucket_length(len(prompt.ids)), new, prompt.chat
        by_shape.setdefault(key, []).append(prompt)
    batches: list[Batch] = []
    for (bucket, new, _), members in sorted(by_shape.items(), reverse=True):
        size = min(batch_size, len(members))
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            drawn = np.random.SeedSequence([seed, len(batches)]).generate_state(1)
            batches.append(Batch(Shape(bucket, new, size), part, int(drawn[0] >> 1)))
    return batches


def shapes(batches: Iterable[Batch]) -> dict[Shape, list[Prompt]]:
    """The prompts of each shape."""
    found: dict[Shape, list[Prompt]] = {}
    for batch in batches:
        found.setdefault(batch.shape, []).extend(batch.prompts)
    return found
