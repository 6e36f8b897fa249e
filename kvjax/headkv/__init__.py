"""HeadKV (arXiv 2410.19258): a cache budget for each head, by what the head is good for."""

from kvjax.headkv.balance import balance
from kvjax.headkv.budgets import allocate
from kvjax.headkv.importance import score_examples
from kvjax.headkv.policy import Compress, Policy
from kvjax.headkv.questions import score_heads
from kvjax.headkv.scores import HeadScores, load_scores

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
