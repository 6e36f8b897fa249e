"""Accuracy of a policy on examples, through the real compressed cache, beside its real bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvjax.answers import exact_match
from kvjax.example import Example
from kvjax.generation import generate
from kvjax.nn import Transformer


@dataclass(frozen=True)
class Outcome:
    """How a policy did.

    Attributes:
        accuracy, standard_error: of exact matches of the whole answer.
        items: examples asked.
        cache_bytes, full_cache_bytes: a sequence, after prefill.
    """

    policy: str
    accuracy: float
    standard_error: float
    items: int
    cache_bytes: int
    full_cache_bytes: int


def measure(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    policy: str,
    batch_size: int = 16,
) -> Outcome:
    """Answers every example by greedy generation under `policy`."""
    longest = max(len(example.answer) for example in examples)
    out = generate(
        model,
        params,
        [example.prompt for example in examples],
        max_new_tokens=longest + 1,
        policy=policy,
        batch_size=batch_size,
    )
    right = np.array(
        [
            exact_match(tokens, example.answer)
            for tokens, example in zip(out.tokens, examples, strict=True)
        ]
    )
    items = len(examples)
    return Outcome(
        policy=policy,
        accuracy=float(right.mean()),
        standard_error=float(np.sqrt(right.mean() * (1 - right.mean()) / items)),
        items=items,
        cache_bytes=out.cache_bytes // items,
        full_cache_bytes=out.full_cache_bytes // items,
    )
