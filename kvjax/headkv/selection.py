"""Which tokens a head keeps.

A scorer gives every token of every head a number; each head keeps the `cap` best besides the
window, the last w tokens. Ties go to the later position; what is kept stays in the order of time.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.headkv.prompt import Prompt, Scorer
from kvjax.headkv.split import Split


@flax.struct.dataclass
class LayerBudget:
    """What the heads of one layer keep. All of it is data: no program depends on a number here.

    Attributes:
        caps: [B, K] int32, tokens that a head keeps besides the window.
        window: [B] int32, the last tokens, which stay in any case.
        rooms: [B, K] int32, rows for new tokens.
        rings: [B, K] bool, whether new tokens, beyond a head's room, take the place of older ones.
        shared: [] bool, whether the heads share the sum of the caps by the scores of a prompt.
        first: [B, D] int32, the layer's first row in the pool of each of D devices.
    """

    caps: Any
    window: Any
    rooms: Any
    rings: Any
    shared: Any
    first: Any


def choose(
    prompt: Prompt, scorer: Scorer, sharing: Split, budget: LayerBudget
) -> tuple[Int[Array, "B K S"], Int[Array, "B K"]]:
    """What every head keeps: the slot of each row, in the order of time, and how many rows.

    A sequence of n tokens keeps min(cap, n − w) + w entries in a head, n if it is shorter than w.
    Slots beyond the count mean nothing.
    """
    K = prompt.keys.shape[1]
    scores = prompt_scores(prompt, scorer)
    counts = jax.lax.cond(
        budget.shared,
        lambda: sharing(scores, prompt.candidates, budget.caps),
        lambda: jnp.minimum(budget.caps, available_tokens(prompt.candidates, K)),
    )
    return with_window(prompt, select(scores, prompt.candidates, counts), counts)


def choose_common(
    prompt: Prompt, scorer: Scorer, caps_B: Int[Array, " B"]
) -> tuple[Int[Array, "B 1 S"], Int[Array, "B 1"]]:
    """As `choose`, where all heads of a layer keep the same tokens: scores are averaged over the
    streams that a scorer rates."""
    scores = jnp.mean(prompt_scores(prompt, scorer), axis=1, keepdims=True)
    counts = jnp.minimum(caps_B[:, None], available_tokens(prompt.candidates, 1))
    return with_window(prompt, select(scores, prompt.candidates, counts), counts)


def prompt_scores(prompt: Prompt, scorer: Scorer) -> Float[Array, "B K S"]:
    """The scorer's numbers; NaN counts as the lowest, so that it displaces nothing."""
    scores = scorer(prompt)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def available_tokens(candidates_BZS: Bool[Array, "B Z S"], heads: int) -> Int[Array, "B K"]:
    """Candidates of every head."""
    count = jnp.sum(candidates_BZS, axis=2, dtype=jnp.int32)
    return jnp.broadcast_to(count, (count.shape[0], heads))


def select(
    scores_BKS: Float[Array, "B K S"],
    candidates_BZS: Bool[Array, "B Z S"],
    counts_BK: Int[Array, "B K"],
) -> Int[Array, "B K S"]:
    """The best candidates of every head, in ascending order; S beyond the head's count.

    Args:
        counts_BK: how many each head keeps, at most its candidates.
    """
    S = scores_BKS.shape[2]
    scores = jnp.where(candidates_BZS, scores_BKS, -jnp.inf)
    # Candidates whose score is −inf still come before what is no candidate.
    scores = jnp.where(candidates_BZS, jnp.maximum(scores, jnp.finfo(scores.dtype).min), scores)
    # A stable sort prefers the lower index; on the reversed row that is the later position.
    order = jnp.argsort(scores[:, :, ::-1], axis=2, descending=True, stable=True)
    rank = jnp.arange(S, dtype=jnp.int32)[None, None]
    kept = jnp.where(rank < counts_BK[:, :, None], S - 1 - order.astype(jnp.int32), S)
    return jnp.sort(kept, axis=-1)


def with_window(
    prompt: Prompt, kept_BKS: Int[Array, "B K S"], counts_BK: Int[Array, "B K"]
) -> tuple[Int[Array, "B K S"], Int[Array, "B K"]]:
    """The kept slots, then those of the window, and how many they are together."""
    held = jnp.broadcast_to(prompt.held, counts_BK.shape)
    window = jnp.minimum(held, prompt.window[:, None])
    rank = jnp.arange(kept_BKS.shape[2], dtype=jnp.int32)[None, None]
    count = counts_BK[:, :, None]
    slots = jnp.where(rank < count, kept_BKS, (held - window)[:, :, None] + rank - count)
    return jnp.clip(slots, 0, kept_BKS.shape[2] - 1), counts_BK + window
