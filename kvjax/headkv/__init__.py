"""HeadKV (arXiv 2410.19258): a cache budget for each head, by what the head is good for."""

from typing import TYPE_CHECKING, Any

from kvjax.headkv.balance import balance
from kvjax.headkv.measure import score_examples
from kvjax.policies.budgets import allocate
from kvjax.policies.importance import HeadScores, load_scores
from kvjax.policies.policy import Compress, Policy

if TYPE_CHECKING:
    from kvjax.pipelines.score import score_heads

__all__ = [
    "Compress",
    "HeadScores",
    "Policy",
    "allocate",
    "balance",
    "load_scores",
    "score_examples",
    "score_heads",
]


def __getattr__(name: str) -> Any:
    # Part of this package's API, but it makes examples with a tokenizer and so lives above it.
    if name == "score_heads":
        from kvjax.pipelines.score import score_heads

        return score_heads
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
