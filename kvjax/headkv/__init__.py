"""HeadKV (arXiv 2410.19258): cache budgets for single heads, by their importance."""

from kvjax.headkv.ablation import without_heads
from kvjax.headkv.balance import balance
from kvjax.headkv.measure import score_examples, score_heads
from kvjax.headkv.need import measure_need
from kvjax.policies.budgets import allocate
from kvjax.policies.importance import HeadScores, default_scores, load_scores
from kvjax.policies.need import NeedCurves, load_need

__all__ = [
    "HeadScores",
    "NeedCurves",
    "allocate",
    "balance",
    "default_scores",
    "load_need",
    "load_scores",
    "measure_need",
    "score_examples",
    "score_heads",
    "without_heads",
]
