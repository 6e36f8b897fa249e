"""Next-token choice: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kvjax.checks import NOT_NEGATIVE, Range, check_ranges

NO_TOKEN = -1
"""Stands where logits are not finite: without it the answer would be token 0 for ever."""
RANGES = {
    "temperature": NOT_NEGATIVE,
    "top_k": Range(least=0, whole=True),
    "top_p": Range(above=0, most=1),
}
ALL = 2**31 - 1
"""A top_k that no vocabulary has more tokens than."""


@flax.struct.dataclass
class Sampling:
    """Settings as arrays, so that changing them compiles nothing anew.

    Attributes:
        temperature: fp32 scalar; 0 is greedy.
        top_k: int32 scalar; only the k most likely tokens, 0 for all.
        top_p: fp32 scalar; only the most likely tokens that together reach this probability
            (nucleus sampling, arXiv 1904.09751), after top-k.
    """

    temperature: Any
    top_k: Any
    top_p: Any

    @classmethod
    def create(cls, temperature: float, top_k: int, top_p: float) -> Sampling:
        """Checked settings.

        Raises:
            ValueError: a setting outside of its range.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_ranges(given, RANGES)
        return cls(
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(min(top_k, ALL), jnp.int32),
            jnp.asarray(top_p, jnp.float32),
        )


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"] | UInt32[Array, "B _"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a sequence, int32; each with its own key, so that rows don't see each other.

    NO_TOKEN where a logit is not finite.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    token_B = jax.lax.cond(
        sampling.temperature > 0,
        lambda: jax.vmap(_sample_row, (0, 0, None))(logits_BV, keys_B, sampling),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )
    return jnp.where(finite_rows(logits_BV), token_B, jnp.int32(NO_TOKEN))


def most_likely(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The id with the largest logit, int32; NO_TOKEN where a logit is not finite."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(finite_rows(logits), best, jnp.int32(NO_TOKEN))


def finite_rows(logits: Float[Array, "*rows V"]) -> Bool[Array, "*rows"]:
    """Whether all numbers of a row are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _sample_row(logits_V: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    order = jnp.argsort(logits_V, descending=True)
    ranked = logits_V[order] / jnp.maximum(sampling.temperature, 1e-6)
    rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
    ranked = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked)
    before = jnp.cumsum(probs) - probs  # probability of all more likely tokens; 0 for the first
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
