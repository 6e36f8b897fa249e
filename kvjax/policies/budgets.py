"""Budgets: how many tokens of a prompt each head keeps.

`allocate` makes budgets from the heads' importance (HeadKV, arXiv 2410.19258, section 3.3).
Allocators divide a KV size among layers and heads for a policy. A `Sharing` lets the heads of a
layer share their budgets by the token scores of a prompt. Budgets are made on the host, once, in
float64; only a `Sharing` runs inside jit. C is the KV size (tokens per head, the recent ones
included), w the number of recent tokens, which are always kept, b = C − w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int, Int32

from kvjax.cache.channels import channel_bytes
from kvjax.checks import COUNT, SHARE, SIZE, Range, check_ranges, optional, shown
from kvjax.config import AttentionConfig, ModelConfig
from kvjax.policies.importance import HeadScores
from pallas_kernels.entries import row_bytes

GRANULARITIES = ("kv_head", "query_head")
BETA = Range(least=1)
RANGES = {
    "kv_size": COUNT,
    "window": SIZE,
    "beta": BETA,
    "num_kv_heads": COUNT,
    "prompt_len": optional(SIZE),
}
"""Allowed values of the numbers of `allocate`."""


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
    """Tokens of the prompt that each head keeps besides the recent ones.

    A head gets a floor m = b − q and a share S of the common part q·L·heads, with q = ⌊b/β⌋. S is
    its importance divided by the sum of all: a smaller β shares more (arXiv 2410.19258, eq. 5).

    Args:
        scores: importance of each query head, [L, N]; or what `score_heads` returns.
        kv_size: C, mean tokens per head, the recent ones included.
        window: w, the recent tokens, which every head keeps besides its budget. Policies call this
            number `observed`; a sliding window is something else.
        beta: at least 1.
        num_kv_heads: K; the query heads of a group share their KV head's budget.
        prompt_len: n; no head keeps more than n − w, and the other heads get what a full head
            cannot use. None: no limit.
        granularity: "kv_head" gives budgets [L, K], "query_head" [L, N].
        compat: "reference" follows the published code: budgets of query heads, each rounded
            separately (half to even) and clipped at n − w without passing the rest on.

    Returns:
        int32 [L, heads]; the sum is exactly min(b, n − w)·L·heads except with compat="reference".

    Raises:
        ValueError: kv_size ≤ window, β < 1, a number out of its range, a negative or NaN score, an
            unknown granularity or compat.
    """
    given = {"kv_size": kv_size, "window": window, "beta": beta}
    check_ranges(given | {"num_kv_heads": num_kv_heads, "prompt_len": prompt_len}, RANGES)
    values = checked(scores.mean if isinstance(scores, HeadScores) else scores)
    budget = token_budget(kv_size, window, "window")
    limit = None if prompt_len is None else max(prompt_len - window, 0)
    if compat not in (None, "reference"):
        raise ValueError(f"compat is {compat!r}, expected None or 'reference'")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}, expected {' or '.join(GRANULARITIES)}")
    if compat == "reference":
        return reference_caps(normalise(values), budget, beta, limit)
    if granularity == "kv_head":
        values = group_importance(values, num_kv_heads)
    limits = None if limit is None else np.full((len(values), 1), limit)
    return head_caps(normalise(values), budget, beta, limits)


def token_budget(kv_size: int, recent: int, name: str = "observed") -> int:
    """b = C − w; raises ValueError unless it is positive. `name` is the setting that gave w."""
    if kv_size <= recent:
        raise ValueError(f"kv_size is {kv_size} and {name} is {recent}, expected kv_size > {name}")
    return kv_size - recent


def group_importance(
    importance: Float64[np.ndarray, "L N"],
    num_kv_heads: int,
    reduce: Callable[..., np.ndarray] = np.sum,
) -> Float64[np.ndarray, "L K"]:
    """Importance of KV heads from that of their query heads; `reduce` may also be `np.max`."""
    layers, heads = importance.shape
    if heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads is {num_kv_heads}, expected a divisor of the {heads} query heads"
        )
    return reduce(importance.reshape(layers, num_kv_heads, -1), axis=2)


def checked(importance: Any) -> Float64[np.ndarray, "L N"]:
    """The importance; raises ValueError unless it is an array [L, N] of numbers ≥ 0 with a finite
    sum."""
    if getattr(importance, "ndim", 0) != 2:
        raise ValueError(
            f"head scores are {shown(importance)}, expected an array [layers, heads] or what "
            "kvjax.headkv.load_scores reads"
        )
    with np.errstate(over="ignore"):
        total = importance.sum()
    if not np.isfinite(total) or (importance < 0).any():
        raise ValueError(
            "head scores have negative, NaN or infinite numbers, expected finite ones ≥ 0"
        )
    return importance


def normalise(importance: Float64[np.ndarray, "L heads"]) -> Float64[np.ndarray, "L heads"]:
    """Importance divided by its sum; equal shares if all are zero."""
    total = importance.sum()
    return importance / total if total > 0 else np.full_like(importance, 1 / importance.size)


def pooled_and_kept(budget: int, beta: float) -> tuple[float, float]:
    """(q, m): tokens that a head gives to the common part and tokens that it keeps; q + m = b."""
    check_ranges({"beta": beta}, {"beta": BETA})
    pooled = budget // beta
    return pooled, budget - pooled


def real_caps(
    shares: Float64[np.ndarray, "L heads"], budget: int, beta: float
) -> Float64[np.ndarray, "L heads"]:
    """S·q·L·heads + m, before rounding."""
    pooled, kept = pooled_and_kept(budget, beta)
    return shares * (pooled * shares.size) + kept


def reference_caps(
    shares: Float64[np.ndarray, "L N"], budget: int, beta: float, limit: int | None
) -> Int32[np.ndarray, "L N"]:
    """The published code's budgets: for b ≥ n − w all heads keep the whole prompt."""
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
    """Whole budgets with the sum Σ min(b, layer's limit), none above the limit of its layer."""
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
    """Clips at the limits, and gives the excess to the other heads in proportion to their shares.

    Heads without a share get part of the excess only when no head with a share has room; they
    then get equal parts.
    """
    if total >= limits.sum():
        return limits.astype(np.float64)
    # Each turn fills at least one more head up to its limit, so the loop ends.
    while (caps > limits).any():
        caps = np.minimum(caps, limits)
        free = caps < limits
        weights = shares * free if (shares * free).any() else free.astype(np.float64)
        caps = caps + (total - caps.sum()) * (weights / weights.sum())
    return caps


def largest_remainder(
    caps: Float64[np.ndarray, "L heads"], total: int
) -> Int32[np.ndarray, "L heads"]:
    """Rounds to integers with the sum `total`; the largest fractions go up, ties by flat index."""
    floors = np.floor(caps)
    missing = total - int(floors.sum())
    up = np.argsort(-(caps - floors), axis=None, kind="stable")[:missing]
    floors.flat[up] += 1
    return floors.astype(np.int32)


def token_bytes(attention: AttentionConfig, dtype: Any) -> int:
    """Bytes of one token in all heads of a layer, with the scales or ranges of its entries."""
    return attention.cached_heads * sum(row_bytes(w, dtype) for w in attention.cached_widths)


def bytes_to_tokens(nbytes: int, config: ModelConfig, dtype: Any) -> int:
    """Mean tokens per head that one sequence can hold, over all layers, in `nbytes` bytes."""
    each = [layer.attention for layer in config.layers]
    left = nbytes - sum(channel_bytes(attention, dtype) for attention in each)
    return max(left, 0) // sum(token_bytes(attention, dtype) for attention in each)


@dataclass(frozen=True)
class Request:
    """The input of an allocator.

    Attributes:
        num_layers, num_kv_heads: L and K.
        kv_size: C, mean tokens per KV head, the recent ones included.
        recent: w, number of last tokens, which every head keeps besides its budget.
        prompt_len: n; a head cannot use a budget above n − w.
        sliding: [L] the sliding window of each layer, None for none; () if no layer has one.
    """

    num_layers: int
    num_kv_heads: int
    kv_size: int
    recent: int
    prompt_len: int
    sliding: tuple[int | None, ...] = ()

    @property
    def budget(self) -> int:
        """b = C − w, mean tokens per head besides the recent ones."""
        return token_budget(self.kv_size, self.recent)

    @property
    def limit(self) -> int:
        """n − w, the largest number of tokens that a head can keep besides the recent ones."""
        return max(self.prompt_len - self.recent, 0)

    @property
    def limits(self) -> Int[np.ndarray, "L 1"]:
        """Largest useful budget of each layer: tokens before a sliding window are never seen."""
        seen = [min(self.prompt_len, window or self.prompt_len) for window in self.sliding]
        seen = seen or [self.prompt_len] * self.num_layers
        return np.maximum(np.asarray(seen) - self.recent, 0)[:, None]


# See `growing_beta`.
HALF_SHARED = 200  # at this budget per head, importance decides about half
LEAST_FLOOR, LEAST_SHARE = 4, 1 / 4  # tokens of every head, and their largest share of the budget

Allocator = Callable[[Request], np.ndarray]
"""Makes budgets [L, K]: whole numbers ≥ 0 with a mean of at most min(budget, limit).

A layer does not use the part of a budget above its limit.
"""


@dataclass(frozen=True)
class Uniform:
    """The same budget for every head."""

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        shape = (request.num_layers, request.num_kv_heads)
        return np.full(shape, min(request.budget, request.limit), np.int32)


@dataclass(frozen=True)
class Pyramid:
    """PyramidKV (arXiv 2406.02069): budgets fall linearly from the first layer to the last."""

    beta: float = 20.0

    def __post_init__(self):
        check_ranges(vars(self), {"beta": Range(least=0.5)})

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        budget = min(request.budget, request.limit)
        # The last layer gets what keeps the mean at `budget`: the sum of both ends is 2 · budget.
        bottom = min(2 * budget - budget / self.beta, request.limit)
        layers = np.linspace(bottom, 2 * budget - bottom, request.num_layers)
        if request.num_layers == 1:
            layers[:] = budget  # the first layer is the last one
        caps = np.repeat(layers[:, None], request.num_kv_heads, axis=1)
        return largest_remainder(caps, budget * caps.size)


@dataclass(frozen=True)
class HeadImportance:
    """HeadKV (arXiv 2410.19258): a floor for every head, the rest in proportion to importance.

    Attributes:
        beta: importance divides 1/β of the budget; None for `growing_beta`.
        scores: None for the model's own scores, which `resolve` fills in.
    """

    beta: float | None = None
    scores: HeadScores | None = None

    def __post_init__(self):
        check_ranges(vars(self), {"beta": optional(BETA)})

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        if self.scores is None:
            raise ValueError("this policy has no head scores yet, expected scores=FILE")
        values = group_importance(checked(self.scores.mean), request.num_kv_heads)
        beta = growing_beta(request.budget) if self.beta is None else self.beta
        return head_caps(normalise(values), request.budget, beta, request.limits)

    def of_layers(self, depth: int) -> HeadImportance:
        """The same for the first `depth` layers."""
        scores = None if self.scores is None else HeadScores(self.scores.samples[:depth])
        return HeadImportance(self.beta, scores)


def growing_beta(budget: int) -> float:
    """β = 1 + b/200: the floor's share of the budget, b/(b + 200), grows with the budget.

    A small cache works best if the few heads that retrieve get nearly all of it. Once these heads
    have enough, the other heads gain more from additional tokens; a fixed small β starves them.
    Every head gets four tokens, or a quarter of a mean budget below 16: heads that importance does
    not see still prepare what others retrieve.
    """
    least = min(LEAST_FLOOR / budget, LEAST_SHARE)
    return max(1.0 + budget / HALF_SHARED, 1 / (1 - least))


Sharing = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Maps (scores [B, K, S], candidates [B, Z, S], caps [B or 1, K]) to counts [B, K]. The counts sum
to at most the sum of the caps, and no count exceeds its head's candidates."""


@dataclass(frozen=True)
class Adaptive:
    """Ada-KV (arXiv 2407.11550): the best tokens of the whole layer, whichever head they are in.

    Each head also keeps the share `alpha` of its cap: count·(1 − α) + cap·α, rounded by largest
    remainder so that the layer uses its whole budget.
    """

    alpha: float = 0.2

    def __post_init__(self):
        check_ranges(vars(self), {"alpha": SHARE})

    def __call__(
        self,
        scores_BKS: Float[Array, "B K S"],
        candidates_BZS: Bool[Array, "B Z S"],
        caps: tuple[int, ...] | Int[Array, "_ K"],
    ) -> Int[Array, "B K"]:
        B, K, S = scores_BKS.shape
        caps_BK = jnp.broadcast_to(jnp.asarray(caps, jnp.int32), (B, K))
        candidates = jnp.broadcast_to(candidates_BZS, (B, K, S))
        available = jnp.sum(candidates, axis=2, dtype=jnp.int32)
        own = jnp.minimum(caps_BK, available)
        # Heads with too few candidates leave part of their caps to the other heads.
        total, most = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (caps_BK, available))
        total = jnp.minimum(total, most)
        # Rank the tokens of all heads together, and count how many of the best are in each head.
        scores = jnp.where(candidates, scores_BKS, -jnp.inf).reshape(B, -1)
        order = jnp.argsort(scores, axis=1, descending=True, stable=True).astype(jnp.int32)
        taken = jnp.arange(K * S, dtype=jnp.int32)[None] < total[:, None]
        heads = jnp.where(taken, order // S, K)
        one_hot = heads[:, :, None] == jnp.arange(K, dtype=jnp.int32)[None, None]
        best = jnp.sum(one_hot, axis=1, dtype=jnp.int32)
        # Mix these counts with the heads' own caps.
        real = best.astype(jnp.float32) * (1.0 - self.alpha) + own.astype(jnp.float32) * self.alpha
        return jnp.minimum(round_to_sum(real, total), available)


def round_to_sum(real_BK: Float[Array, "B K"], total_B: Int[Array, " B"]) -> Int[Array, "B K"]:
    """Rounds by largest remainder; the sum is `total`, or the rounded sum if that is less."""
    floors = jnp.floor(real_BK)
    whole = jnp.round(jnp.sum(real_BK, axis=1)).astype(jnp.int32)
    missing = jnp.minimum(whole, total_B) - jnp.sum(floors, axis=1).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(floors - real_BK, axis=1, stable=True), axis=1)
    up = rank.astype(jnp.int32) < missing[:, None]
    return floors.astype(jnp.int32) + up.astype(jnp.int32)
