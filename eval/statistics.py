"""How sure a score is, whether two differ, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of independent scores: s / √n with s² = Σ(x − x̄)² / (n − 1); nan below two."""
    count = len(scores)
    if count < 2:
        return math.nan
    mean = math.fsum(scores) / count
    variance = math.fsum((score - mean) ** 2 for score in scores) / (count - 1)
    return math.sqrt(variance / count)


@dataclass(frozen=True)
class McNemar:
    """Two methods on the same questions.

    Attributes:
        only_first: questions that the first alone got right.
        only_second: and the second alone.
        p_value: two-sided: of a difference at least this large if both were equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool | float], second: Sequence[bool | float]) -> McNemar:
    """McNemar's test in its exact binomial form.

    Questions that both or neither got right say nothing about the difference. Of the b + c others
    each falls to either side with probability ½, so p = min(1, 2·P(X ≤ min(b, c))) with
    X ~ Binomial(b + c, ½) (McNemar 1947, Psychometrika 12; Fagerland et al. 2013, BMC Medical
    Research Methodology 13:91, eq. 2).

    Args:
        first, second: right or wrong (1 or 0) on each question, in the same order.

    Raises:
        ValueError: different lengths, or scores between 0 and 1.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} scores, expected the same questions")
    partial = [score for score in (*first, *second) if score not in (0, 1)]
    if partial:
        raise ValueError(f"got a score of {partial[0]}, expected 0 or 1")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    count = only_first + only_second
    tail = sum(math.comb(count, i) for i in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**count))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples, drawn without replacement, passes.

    1 − C(n − c, k) / C(n, k) = 1 − Π_{i=n−c+1..n} (1 − k/i), with n samples of which c passed
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1).

    Raises:
        ValueError: not 0 ≤ c ≤ n or not 1 ≤ k ≤ n.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"got n={samples}, c={passed}, k={k}; expected 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))
