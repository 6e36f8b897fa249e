"""Token scorers: what makes a prompt token worth keeping."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.checks import COUNT, SHARE, SIZE, check_ranges
from kvjax.headkv.prompt import Prompt, by_kv_head, query_attention


@dataclass(frozen=True)
class ObservationWindow:
    """SnapKV (arXiv 2404.14469): the attention that the last w queries pay to a token.

    Averaged over these queries and over the query heads of a group, then max-pooled over
    neighbouring tokens, so that a token that is kept keeps its surroundings.
    """

    pool: int = 7

    def __post_init__(self):
        check_ranges(vars(self), {"pool": COUNT})

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        scores_BKS = by_kv_head(window_attention(prompt), prompt.keys.shape[1])
        return max_pool(scores_BKS, prompt.candidates, self.pool)


@dataclass(frozen=True)
class SpanWindow:
    """As `ObservationWindow`, but what follows a token counts more than what comes before it.

    A question looks at where an answer begins; the rest of a long answer gets no attention until
    it is written. A token's score is the largest of its own, those of the tokens up to `ahead`
    before it, and those of the tokens up to `behind` after it, less the share `falloff` for each
    token of distance: however few tokens a head keeps, they are those next to what was looked at.
    """

    ahead: int = 11
    behind: int = 3
    falloff: float = 0.01

    def __post_init__(self):
        check_ranges(vars(self), {"ahead": SIZE, "behind": SIZE, "falloff": SHARE})

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        scores_BKS = by_kv_head(window_attention(prompt), prompt.keys.shape[1])
        scores_BKS = jnp.where(prompt.candidates, scores_BKS, 0.0)
        pooled = scores_BKS
        # Ahead first: what stands as far before as after a token counts less.
        for distance in range(1, self.ahead + 1):
            pooled = jnp.maximum(pooled, self._shifted(scores_BKS, distance, distance))
        for distance in range(1, self.behind + 1):
            pooled = jnp.maximum(
                pooled, self._shifted(scores_BKS, -distance, self.ahead + distance)
            )
        return pooled

    def _shifted(self, scores_BKS: jax.Array, by: int, distance: int) -> jax.Array:
        """Scores moved to later slots, less the falloff of a distance."""
        sides = ((0, 0), (0, 0), (max(by, 0), max(-by, 0)))
        padded = jnp.pad(scores_BKS, sides)
        start = max(-by, 0)
        return padded[:, :, start : start + scores_BKS.shape[2]] * (1.0 - self.falloff * distance)


@dataclass(frozen=True)
class SinksAndRecent:
    """StreamingLLM (arXiv 2309.17453): the first tokens, then the most recent ones."""

    sinks: int = 4

    def __post_init__(self):
        check_ranges(vars(self), {"sinks": SIZE})

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        B, K, S, _ = prompt.keys.shape
        slot = jnp.arange(S, dtype=jnp.int32)
        score = jnp.where(slot < self.sinks, S, slot).astype(jnp.float32)
        return jnp.broadcast_to(score[None, None], (B, K, S))


@dataclass(frozen=True)
class LastQuery:
    """TOVA (arXiv 2401.06104): the attention of the last query, averaged over all heads.

    All heads of a layer score alike.
    """

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        B, K, S, _ = prompt.keys.shape
        last = query_attention(prompt)[:, :, -1]
        mean = jnp.mean(last, axis=1, keepdims=True)
        return jnp.broadcast_to(mean, (B, K, S))


@dataclass(frozen=True)
class KeyNorm:
    """KNorm (arXiv 2406.11430): keys of small norm draw much attention; −‖k‖₂."""

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        return -jnp.linalg.norm(prompt.keys.astype(jnp.float32), axis=-1)


@dataclass(frozen=True)
class KeyDifference:
    """KeyDiff (arXiv 2504.15364): keys unlike the others; −cos(k, mean of the normalised keys)."""

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        keys = prompt.keys.astype(jnp.float32)
        norm = jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        unit = keys / norm  # slots that are not in use hold zeros and add nothing
        anchor = jnp.sum(unit, axis=2, keepdims=True)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.sum(unit * anchor, axis=-1)


def window_attention(prompt: Prompt) -> Float[Array, "B N S"]:
    """Attention of the last queries over all keys, averaged over the queries, fp32."""
    total = jnp.sum(query_attention(prompt), axis=2)
    queries = jnp.minimum(prompt.lengths, prompt.queries.shape[1]).astype(jnp.float32)
    return total / queries[:, None, None]


def max_pool(
    scores_BKS: Float[Array, "B K S"], candidates_BZS: Bool[Array, "B Z S"], size: int
) -> Float[Array, "B K S"]:
    """The largest score of a candidate among `size` neighbours, stride 1, same length."""
    scores = jnp.where(candidates_BZS, scores_BKS, -jnp.inf)
    return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (1, 1, size), (1, 1, 1), "SAME")
