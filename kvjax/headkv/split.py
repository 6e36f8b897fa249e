"""Splits: how the heads of a layer share the layer's budget, from the scores of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.checks import SHARE, check_ranges

Split = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(scores [B, K, S], candidates [B, Z, S], caps [B or 1, K]) to counts [B, K], whose sum is at
most that of the caps and no count above a head's candidates."""


@dataclass(frozen=True)
class Adaptive:
    """Ada-KV (arXiv 2407.11550): the best tokens of the whole layer, whatever head they are in.

    Each head keeps the share `alpha` of its own budget besides: count·(1 − α) + cap·α, rounded
    by largest remainder, so that the layer's budget is used up.
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
        # What heads with too few candidates leave over goes to the others.
        total, most = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (caps_BK, available))
        total = jnp.minimum(total, most)
        scores = jnp.where(candidates, scores_BKS, -jnp.inf).reshape(B, -1)
        order = jnp.argsort(scores, axis=1, descending=True, stable=True).astype(jnp.int32)
        taken = jnp.arange(K * S, dtype=jnp.int32)[None] < total[:, None]
        heads = jnp.where(taken, order // S, K)
        one_hot = heads[:, :, None] == jnp.arange(K, dtype=jnp.int32)[None, None]
        best = jnp.sum(one_hot, axis=1, dtype=jnp.int32)
        real = best.astype(jnp.float32) * (1.0 - self.alpha) + own.astype(jnp.float32) * self.alpha
        return jnp.minimum(round_to_sum(real, total), available)


def round_to_sum(real_BK: Float[Array, "B K"], total_B: Int[Array, " B"]) -> Int[Array, "B K"]:
    """Whole numbers by largest remainder; their sum is total, or Σ real rounded if that is less."""
    floors = jnp.floor(real_BK)
    whole = jnp.round(jnp.sum(real_BK, axis=1)).astype(jnp.int32)
    missing = jnp.minimum(whole, total_B) - jnp.sum(floors, axis=1).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(floors - real_BK, axis=1, stable=True), axis=1)
    up = rank.astype(jnp.int32) < missing[:, None]
    return floors.astype(jnp.int32) + up.astype(jnp.int32)
