"""A model that is being evaluated, and its policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.headkv.policy import Policy, resolve
from kvjax.headkv.scores import default_scores
from kvjax.nn import Transformer


@dataclass(frozen=True)
class Loaded:
    """A model with its parameters and tokenizer, and what it was called."""

    name: str
    model: Transformer
    params: Any
    tokenizer: Any

    @property
    def dtype(self) -> Any:
        """Of the parameters and the cache."""
        return self.params["embedding"].dtype


def bounds_growth(policy: Policy) -> bool:
    """Whether entries leave its cache while tokens come in: those fed in pieces don't show it."""
    return bool(getattr(policy, "ring", 0) or getattr(policy, "every", 0))


def resolve_all(names: Sequence[str], model: Transformer) -> dict[str, Policy]:
    """Policies by name, with the model's head scores where they need some."""
    scores = default_scores(model.config)
    return {name: resolve(name, model.config, scores) for name in names}
