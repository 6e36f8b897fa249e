"""Budgets as a share of each prompt, where the plan's own are a share of the whole bucket."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class PromptShare:
    """Scales the budgets of a bucket down to those of a prompt that does not fill it.

    The rows of a cache are those of the bucket, which compiled programs are made for; how many of
    them a sequence fills is data.

    Attributes:
        ratio: tokens that a head keeps on average, window included, as a share of the prompt.
        window: tokens that every head keeps besides its budget.
        queries: the least window: a head keeps at least one token more.
        budget: mean budget of the heads for a prompt that fills the bucket.
    """

    ratio: float
    window: int
    queries: int
    budget: int

    def caps(self, caps_K: Int[Array, " K"], lengths_B: Int[Array, " B"]) -> Int[Array, "B K"]:
        """Each head's budget for prompts of so many tokens, never above the bucket's."""
        kept = jnp.round(self.ratio * lengths_B.astype(jnp.float32))
        kept = jnp.maximum(kept, jnp.float32(self.queries + 1)) - self.window
        part = jnp.clip(kept / self.budget, 0.0, 1.0)
        caps = caps_K.astype(jnp.float32)[None] * part[:, None]
        return jnp.floor(caps + 0.5).astype(jnp.int32)


def prompt_caps(
    share: PromptShare | None, caps: tuple[int, ...], lengths_B: Int[Array, " B"]
) -> Int[Array, "#B K"]:
    """The budgets of a layer's heads: the same for all sequences, unless they are shares."""
    caps_K = jnp.asarray(caps, jnp.int32)
    return caps_K[None] if share is None else share.caps(caps_K, lengths_B)
