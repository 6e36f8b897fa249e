"""Head budgets: how many prompt tokens each head keeps, from its importance (HeadKV, section 3.3).

Budgets are made on the host, once, in float64: they are compile-time constants of the cache.
C is the KV size (tokens a head, the window included), w the window, b = C − w.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int, Int32

from kvjax.checks import COUNT, SIZE, Range, check_ranges, optional
from kvjax.headkv.scores import HeadScores

GRANULARITIES = ("kv_head", "query_head")
BETA = Range(least=1)
RANGES = {
    "kv_size": COUNT,
    "window": SIZE,
    "beta": BETA,
    "num_kv_heads": COUNT,
    "prompt_len": optional(SIZE),
}
"""The numbers of `allocate`."""


def allocate(
    scores: HeadScores | Float64[np.ndarray, "L N"],
    kv_size: int = 128,
    window: int = 8,
    beta: float = 1.2,
    num_kv_heads: int = 8,
    prompt_len: int | None = None,
    granularity: str = "kv_head",
    compat: str | None = None,
) -> Int32[np.ndarray, "L heads"]:
    """Tokens of the prompt that each head keeps besides the window.

    A head gets a floor m = b − q and a share S of the pool q·L·heads, q = ⌊b/β⌋, where S is its
    importance divided by the sum of all: a smaller β shares more (arXiv 2410.19258, eq. 5).

    Args:
        scores: importance of each query head, [L, N].
        kv_size: C, mean tokens a head, the window included.
        window: w, the last tokens, which every head keeps besides its budget.
        beta: at least 1.
        num_kv_heads: K; the query heads of a group share their KV head's budget.
        prompt_len: n; no head keeps more than n − w, and what a saturated head cannot use goes to
            the others. None: no limit.
        granularity: "kv_head" gives budgets [L, K], "query_head" [L, N].
        compat: "reference" follows the published code: budgets of query heads, each rounded on its
            own (half to even), clipped at n − w without passing the rest on.

    Returns:
        int32 [L, heads]; the sum is exactly min(b, n − w)·L·heads except with compat="reference".

    Raises:
        ValueError: kv_size ≤ window, β < 1, a number out of its range, a negative or NaN score, a
            name that does not exist.
    """
    given = {"kv_size": kv_size, "window": window, "beta": beta}
    check_ranges(given | {"num_kv_heads": num_kv_heads, "prompt_len": prompt_len}, RANGES)
    values = checked(scores.mean if isinstance(scores, HeadScores) else scores)
    budget = token_budget(kv_size, window)
    limit = None if prompt_len is None else max(prompt_len - window, 0)
    if compat not in (None, "reference"):
        raise ValueError(f"compat is {compat!r}, expected None or 'reference'")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}, expected {' or '.join(GRANULARITIES)}")
    if compat == "reference":
        return reference_caps(normalise(values), budget, beta, limit)
    if granularity == "kv_head":
        values = group_scores(values, num_kv_heads)
    limits = None if limit is None else np.full((len(values), 1), limit)
    return head_caps(normalise(values), budget, beta, limits)


def token_budget(kv_size: int, window: int) -> int:
    """b = C − w; ValueError where nothing is left for the heads."""
    if kv_size <= window:
        raise ValueError(f"kv_size is {kv_size} and window is {window}, expected kv_size > window")
    return kv_size - window


def group_scores(
    scores: Float64[np.ndarray, "L N"],
    num_kv_heads: int,
    reduce: Callable[..., np.ndarray] = np.sum,
) -> Float64[np.ndarray, "L K"]:
    """Scores of KV heads from those of the G query heads that read them; `np.max` works too."""
    layers, heads = scores.shape
    if heads % num_kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of num_kv_heads = {num_kv_heads}")
    return reduce(scores.reshape(layers, num_kv_heads, -1), axis=2)


def checked(scores: Float64[np.ndarray, "L N"]) -> Float64[np.ndarray, "L N"]:
    """The scores; ValueError where one is negative, or one or their sum is not finite."""
    with np.errstate(over="ignore"):
        total = scores.sum()
    if not np.isfinite(total) or (scores < 0).any():
        raise ValueError("head scores hold negative or non-finite values, expected finite >= 0")
    return scores


def normalise(scores: Float64[np.ndarray, "L heads"]) -> Float64[np.ndarray, "L heads"]:
    """Scores that sum to 1; equal shares where all are zero."""
    total = scores.sum()
    return scores / total if total > 0 else np.full_like(scores, 1 / scores.size)


def split_budget(budget: int, beta: float) -> tuple[float, float]:
    """(q, m): what a head gives to the shared pool and what it keeps, q + m = b."""
    check_ranges({"beta": beta}, {"beta": BETA})
    pooled = budget // beta
    return pooled, budget - pooled


def real_caps(
    shares: Float64[np.ndarray, "L heads"], budget: int, beta: float
) -> Float64[np.ndarray, "L heads"]:
    """S·q·L·heads + m, before rounding."""
    pooled, kept = split_budget(budget, beta)
    return shares * (pooled * shares.size) + kept


def reference_caps(
    shares: Float64[np.ndarray, "L N"], budget: int, beta: float, limit: int | None
) -> Int32[np.ndarray, "L N"]:
    """The published code's budgets; b ≥ n − w evicts nothing."""
    caps = np.rint(real_caps(shares, budget, beta))
    if limit is not None:
        caps = np.full_like(caps, limit) if budget > limit else np.minimum(caps, limit)
    return caps.astype(np.int32)


def head_caps(
    shares: Float64[np.ndarray, "L heads"],
    budget: int,
    beta: float,
    limits: Int[np.ndarray, "L 1"] | None,
) -> Int32[np.ndarray, "L heads"]:
    """Budgets that sum to exactly Σ min(b, what the limits leave), none above its layer's limit."""
    caps, total = real_caps(shares, budget, beta), budget * shares.size
    if limits is not None:
        most = np.broadcast_to(limits, shares.shape)
        total = min(total, int(most.sum()))
        caps = water_fill(caps, shares, most, total)
    return largest_remainder(caps, total)


def water_fill(
    caps: Float64[np.ndarray, "L heads"],
    shares: Float64[np.ndarray, "L heads"],
    limits: Int[np.ndarray, "L heads"],
    total: int,
) -> Float64[np.ndarray, "L heads"]:
    """Clips at the limits and gives what is left to the other heads in proportion to their shares.

    Heads without a share come last, in equal parts.
    """
    if total >= limits.sum():
        return limits.astype(np.float64)
    while (caps > limits).any():
        caps = np.minimum(caps, limits)
        free = caps < limits
        weights = shares * free if (shares * free).any() else free.astype(np.float64)
        caps = caps + (total - caps.sum()) * (weights / weights.sum())
    return caps


def largest_remainder(
    caps: Float64[np.ndarray, "L heads"], total: int
) -> Int32[np.ndarray, "L heads"]:
    """Rounds to integers that sum to `total`; the largest fractions go up, ties by flat index."""
    floors = np.floor(caps)
    missing = total - int(floors.sum())
    up = np.argsort(-(caps - floors), axis=None, kind="stable")[:missing]
    floors.flat[up] += 1
    return floors.astype(np.int32)


def used_tokens(
    caps: Int[np.ndarray, "L heads"], window: int, prompt_len: int
) -> Int32[np.ndarray, "L heads"]:
    """Entries that each head really holds of a prompt: min(cap, n − w) + w, or n if shorter."""
    kept = np.minimum(caps, max(prompt_len - window, 0)) + min(prompt_len, window)
    return kept.astype(np.int32)
