"""A model that is being evaluated, and its policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.identity import array_digest, identity
from kvjax.nn import Transformer
from kvjax.policies.budgets import HeadImportance
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve
from kvjax.policies.policy import Compress, Policy


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


def facts(model: Transformer, params: Any, policies: Mapping[str, Policy]) -> dict[str, Any]:
    """What a name does not say: a checkpoint or a score file of that name may have changed."""
    found = identity(model.config, params)
    return {
        "config": found.config,
        "weights": found.digest,
        "dtype": found.dtype,
        "head_scores": score_digests(policies),
    }


def score_digests(policies: Mapping[str, Policy]) -> dict[str, str]:
    """What the head scores of each policy that has some contain, as a digest."""
    found = {}
    for name, policy in policies.items():
        allocator = policy.allocator if isinstance(policy, Compress) else None
        if isinstance(allocator, HeadImportance) and allocator.scores is not None:
            found[name] = array_digest(allocator.scores.samples)
    return found
