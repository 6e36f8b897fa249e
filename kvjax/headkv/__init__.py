"""HeadKV (arXiv 2410.19258): cache budgets for single heads, by their importance."""

from kvjax.headkv.balance import balance
from kvjax.headkv.measure import score_examples, score_heads
from kvjax.policies.budgets import allocate
from kvjax.policies.importance import HeadScores, load_scores

__all__ = [
    "HeadScores",
    "allocate",
    "balance",
    "load_scores",
    "score_examples",
    "score_heads",
]
