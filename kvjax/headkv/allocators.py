"""Budget allocators: how a KV size is divided among layers and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from kvjax.checks import Range, check_ranges, optional
from kvjax.headkv.budgets import (
    BETA,
    checked,
    group_scores,
    head_caps,
    largest_remainder,
    normalise,
    token_budget,
)
from kvjax.headkv.scores import HeadScores


@dataclass(frozen=True)
class Request:
    """What an allocator is asked for.

    Attributes:
        num_layers, num_kv_heads: L and K.
        kv_size: C, mean tokens a KV head, the window included.
        window: w, the last tokens, which every head keeps besides its budget.
        prompt_len: n; a budget above n − w is useless.
        sliding: [L] the sliding window of each layer, None without one; () for no layer with one.
    """

    num_layers: int
    num_kv_heads: int
    kv_size: int
    window: int
    prompt_len: int
    sliding: tuple[int | None, ...] = ()

    @property
    def budget(self) -> int:
        """b = C − w, mean tokens a head besides the window."""
        return token_budget(self.kv_size, self.window)

    @property
    def limit(self) -> int:
        """n − w, the most that a head can keep besides the window."""
        return max(self.prompt_len - self.window, 0)

    @property
    def limits(self) -> Int[np.ndarray, "L 1"]:
        """The most that a head of each layer can use: behind a sliding window nothing is seen."""
        seen = [min(self.prompt_len, window or self.prompt_len) for window in self.sliding]
        seen = seen or [self.prompt_len] * self.num_layers
        return np.maximum(np.asarray(seen) - self.window, 0)[:, None]


HALF_SHARED = 200  # tokens a head, besides the window, of which half are shared by importance

Allocator = Callable[[Request], np.ndarray]
"""Budgets [L, K], whole numbers of at least 0, whose mean is at most min(budget, limit).

What a layer gets above its limit is not used.
"""


@dataclass(frozen=True)
class Uniform:
    """The same budget everywhere."""

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        shape = (request.num_layers, request.num_kv_heads)
        return np.full(shape, min(request.budget, request.limit), np.int32)


@dataclass(frozen=True)
class Pyramid:
    """PyramidKV (arXiv 2406.02069): budgets fall linearly from the first layer to the last."""

    beta: float = 20.0

    def __post_init__(self):
        check_ranges(vars(self), {"beta": Range(least=0.5)})

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        budget = min(request.budget, request.limit)
        bottom = min(2 * budget - budget / self.beta, request.limit)
        layers = np.linspace(bottom, 2 * budget - bottom, request.num_layers)
        if request.num_layers == 1:
            layers[:] = budget  # the first layer is the last one
        caps = np.repeat(layers[:, None], request.num_kv_heads, axis=1)
        return largest_remainder(caps, budget * caps.size)


@dataclass(frozen=True)
class HeadImportance:
    """HeadKV (arXiv 2410.19258): a floor for every head, the rest in proportion to importance.

    Attributes:
        beta: a share 1/β of the budget is divided by importance; None for `growing_beta`.
        scores: None stands for the model's own, which `resolve` fills in.
    """

    beta: float | None = None
    scores: HeadScores | None = None

    def __post_init__(self):
        check_ranges(vars(self), {"beta": optional(BETA)})

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        if self.scores is None:
            raise ValueError("head importance has no scores; resolve() fills in the model's own")
        values = group_scores(checked(self.scores.mean), request.num_kv_heads)
        beta = growing_beta(request.budget) if self.beta is None else self.beta
        return head_caps(normalise(values), request.budget, beta, request.limits)


def growing_beta(budget: int) -> float:
    """β = 1 + b/200: the floor's share of the budget, b/(b + 200), grows with it.

    A small cache serves best where the few heads that retrieve get nearly all of it; once these
    have what they can use, more is worth more to the others, which a fixed small β would starve.
    """
    return 1.0 + budget / HALF_SHARED
