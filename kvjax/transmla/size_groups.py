"""Few sizes for many layers: layers of one size share their compiled programs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvjax.transmla.sizes import Sizes

MOST = 3
"""Sizes (rank and rope_dim) of a model: each is a kind of layer, with programs of its own."""

Changes = dict[int, Sizes]
"""New sizes of some layers."""


def few_sizes(
    sizes: Sequence[Sizes],
    step: int,
    possible: Callable[[int, Sizes], bool],
    measure: Callable[[Mapping[int, Sizes]], float],
    most: int = MOST,
) -> list[Sizes]:
    """At most `most` sizes, which hold no more numbers in all than the sizes that are given.

    Two sizes at a time become one, those for which the loss is least.

    Args:
        sizes: one a layer, a multiple of `step` apart.
        possible: whether a layer can have a size.
        measure: the loss with other sizes in some layers than those that are given.

    Returns:
        One a layer. There are more than `most` only where layers have no possible size in common.
    """
    sizes, changes = list(sizes), Changes()
    while len(groups(sizes)) > most:
        choices = [
            merger
            for merger in mergers(sizes, step)
            if all(possible(layer, size) for layer, size in merger.items())
        ]
        if not choices:
            break
        best = min(choices, key=lambda choice: measure(changes | choice))
        changes |= best
        for layer, size in best.items():
            sizes[layer] = size
    return sizes


def groups(sizes: Sequence[Sizes]) -> dict[tuple[int, int], list[int]]:
    """The layers of each rank and rope_dim."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer, size in enumerate(sizes):
        found.setdefault((size.rank, size.rope_dim), []).append(layer)
    return found


def mergers(sizes: Sequence[Sizes], step: int) -> Iterator[Changes]:
    """Every way to give the layers of two sizes one: the numbers that both hold on average,
    down to a multiple of the step, and a rope_dim between the two."""
    for first, second in itertools.combinations(groups(sizes).items(), 2):
        (rank, rope), ours = first
        (other_rank, other_rope), theirs = second
        total = len(ours) * (rank + rope) + len(theirs) * (other_rank + other_rope)
        steps = (total // (len(ours) + len(theirs)) - rank - rope) // step
        low, high = sorted((rope, other_rope))
        for width in range(low, high + 1, step):
            size = (rank + rope + steps * step - width, width)
            yield {
                layer: dataclasses.replace(sizes[layer], rank=size[0], rope_dim=size[1])
                for layer in (*ours, *theirs)
                if (sizes[layer].rank, sizes[layer].rope_dim) != size
            }
