"""Does the `equal_cache` conversion answer as the original model? Part of `benchmarks.coder_tasks`.

Both are fed a prompt and the original's answer. Greedy decoding takes the best token at each place,
so the converted model gives the same answer if its best token is the answer's next one at every
place, the end included. That takes one forward pass for each item. Decoding with `equal_cache`
would rebuild all keys at each step: the method is made for training.

A difference is a tie where the original's two best logits are less than `TIE` apart. What follows
an item's first difference says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax.nn import Transformer
from kvjax.prefilling import bucket_length, pad

TIE = 1e-3
BATCH = 2


class Fed(NamedTuple):
    """A prompt with the original's answer.

    Attributes:
        ids: of prompt and answer.
        start: number of the prompt's tokens.
        ends: ids that may follow the answer; none where the answer was cut at its longest.
    """

    name: str
    ids: Sequence[int]
    start: int
    ends: tuple[int, ...]


def best_two(
    model: Transformer, params: Any, items: Sequence[Fed]
) -> Iterator[tuple[Fed, Int[np.ndarray, "N 2"], Float[np.ndarray, " N"]]]:
    """For each item and each of its N places from the prompt's end on: the ids of the two largest
    logits, and their distance."""
    ordered = sorted(items, key=lambda item: len(item.ids), reverse=True)
    for first in range(0, len(ordered), BATCH):
        part = ordered[first : first + BATCH]
        rows = [item.ids for item in part] + [part[0].ids] * (BATCH - len(part))
        tokens, lengths = pad(rows, bucket_length(max(map(len, rows))))
        steps = np.arange(tokens.shape[1], dtype=np.int32)[None]
        positions = np.where(steps < lengths[:, None], steps, -1).astype(np.int32)
        logits, _ = model.apply({"params": params}, tokens, positions)
        values, ids = (np.asarray(x) for x in _top_two(logits))
        del logits
        for row, item in enumerate(part):
            places = slice(item.start - 1, len(item.ids))
            yield item, ids[row, places], values[row, places, 0] - values[row, places, 1]


@jax.jit
def _top_two(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, ids = jax.lax.top_k(logits.astype(jnp.float32), 2)
    return values, ids


def leaves(item: Fed, best: Int[np.ndarray, "N 2"]) -> bool:
    """Whether the best token is not the answer's next one at some place."""
    answer = np.asarray(item.ids[item.start :])
    ended = not item.ends or int(best[len(answer), 0]) in item.ends
    return bool((best[: len(answer), 0] != answer).any() or not ended)


def first_difference(
    original: Int[np.ndarray, "N 2"], converted: Int[np.ndarray, "N 2"], gaps: np.ndarray
) -> tuple[int, float]:
    """The first place where the best tokens differ, −1 for none, and the original's gap there."""
    places = np.flatnonzero(original[:, 0] != converted[:, 0])
    return (int(places[0]), float(gaps[places[0]])) if places.size else (-1, 0.0)


def compared(items: Sequence[Fed], first: Sequence[tuple[str, int, float]]) -> dict[str, Any]:
    """How many items are the same, tied and different.

    Args:
        first: name, first difference and gap of each item that was read by both models.
    """
    gaps = {name: gap for name, place, gap in first if place >= 0}
    tied = {name for name, gap in gaps.items() if gap < TIE}
    return {
        "items": len(items),
        "tokens": sum(len(item.ids) - item.start for item in items),
        "same": len(items) - len(gaps),
        "tied": len(tied),
        "different": sorted(set(gaps) - tied),
        "gaps": {name: round(gap, 6) for name, gap in gaps.items()},
    }
