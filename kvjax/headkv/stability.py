"""How much of an importance ranking is chance: the agreement of two halves of the samples."""

import numpy as np

from kvjax.headkv.scores import HeadScores


def split_half(scores: HeadScores, splits: int = 20) -> float:
    """Spearman correlation of the heads' means over two random halves, the mean of some splits.

    Returns:
        at most 1; NaN for fewer than two samples, or where all heads are equal.
    """
    count = scores.samples.shape[2]
    if count < 2:
        return float("nan")
    rng = np.random.default_rng(0)
    correlations = []
    for _ in range(splits):
        order = rng.permutation(count)
        halves = (order[: count // 2], order[count // 2 :])
        correlations.append(spearman(*(scores.samples[:, :, half].mean(axis=2) for half in halves)))
    return float(np.mean(correlations))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; equal values share their mean rank. NaN where all of one are equal."""
    x, y = (_ranks(values) for values in (a, b))
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[group.reshape(-1)]
