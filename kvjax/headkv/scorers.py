"""Token scorers: what makes a prompt token worth keeping."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.headkv.selection import Prompt
from pallas_kernels.reference import NEG_INF, soft_cap


@dataclass(frozen=True)
class ObservationWindow:
    """SnapKV (arXiv 2404.14469): the attention that the last w queries pay to a token.

    Averaged over these queries and over the query heads of a group, then max-pooled over
    neighbouring tokens, so that a token that is kept keeps its surroundings.
    """

    pool: int = 7

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        attention_BNS = window_attention(prompt)
        B, N, S = attention_BNS.shape
        K = prompt.keys.shape[1]
        scores_BKS = jnp.mean(attention_BNS.reshape(B, K, N // K, S), axis=2)
        return max_pool(scores_BKS, prompt.candidates, self.pool)


@dataclass(frozen=True)
class SinksAndRecent:
    """StreamingLLM (arXiv 2309.17453): the first tokens, then the most recent ones."""

    sinks: int = 4

    def __call__(self, prompt: Prompt) -> Float[Array, "B K S"]:
        B, K, S, _ = prompt.keys.shape
        position = jnp.arange(S, dtype=jnp.int32)
        score = jnp.where(position < self.sinks, S, position).astype(jnp.float32)
        return jnp.broadcast_to(score[None, None], (B, K, S))


def window_attention(prompt: Prompt) -> Float[Array, "B N S"]:
    """Attention of the last queries over all keys, averaged over the queries, fp32."""
    total = jnp.sum(query_attention(prompt), axis=2)
    queries = jnp.minimum(prompt.lengths, prompt.queries.shape[1]).astype(jnp.float32)
    return total / queries[:, None, None]


def query_attention(prompt: Prompt) -> Float[Array, "B N w S"]:
    """Attention of each of the last queries over all keys, fp32; zeros for rows without a query.

    The softmax is over all n keys, causal inside the window, with the layer's scale, soft-cap and
    sliding window.
    """
    B, w, N, X = prompt.queries.shape
    K, S = prompt.keys.shape[1:3]
    q = prompt.queries.reshape(B, w, K, N // K, X)
    logits = jnp.einsum("bwkgx,bksx->bkgws", q, prompt.keys, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * prompt.spec.scale, prompt.spec.softcap).reshape(B, N, w, S)
    at = prompt.lengths[:, None] - w + jnp.arange(w, dtype=jnp.int32)[None]
    seen = seen_by_window(at, S, prompt.spec.window)[:, None]
    attention = jax.nn.softmax(jnp.where(seen, logits, NEG_INF), axis=-1)
    return jnp.where(seen, attention, 0.0)


def seen_by_window(at_Bw: jax.Array, slots: int, window: int | None) -> Bool[Array, "B w S"]:
    """Keys that the query at each position sees; a negative position is no query."""
    distance = at_Bw[:, :, None] - jnp.arange(slots, dtype=jnp.int32)[None, None]
    seen = (distance >= 0) & (at_Bw >= 0)[:, :, None]
    return seen if window is None else seen & (distance < window)


def max_pool(
    scores_BKS: Float[Array, "B K S"], candidates_BS: Bool[Array, "B S"], size: int
) -> Float[Array, "B K S"]:
    """The largest score of a candidate among `size` neighbours, stride 1, same length."""
    scores = jnp.where(candidates_BS[:, None], scores_BKS, -jnp.inf)
    return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (1, 1, size), (1, 1, 1), "SAME")
