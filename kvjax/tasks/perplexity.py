"""Perplexity of a model on chunks of tokens."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.checks import not_finite
from kvjax.nn import Transformer


def chunk_losses(
    model: Transformer, params: Any, tokens: Int[Array, "B T"]
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood, in nats, of every token but the first of each chunk; fp32."""
    return _losses(model.apply({"params": params}, tokens)[0], tokens)


@jax.jit
def _losses(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def perplexity(model: Transformer, params: Any, batches: Iterable[np.ndarray]) -> float:
    """exp of the mean loss over all predictions of all chunks.

    Args:
        batches: int32 [B, T] each; T (and B) may differ, every shape compiles once.

    Raises:
        ValueError: no batch, or chunks of a single token: nothing to predict; or losses that are
            not finite.
    """
    total, count = 0.0, 0
    for tokens in batches:
        losses = np.asarray(chunk_losses(model, params, jnp.asarray(tokens)), np.float64)
        check_losses(losses, model, params, tokens)
        total, count = total + losses.sum(), count + losses.size
    if count == 0:
        raise ValueError("got no token to predict, expected chunks of at least two tokens")
    return float(np.exp(total / count))


def check_losses(
    losses: Float[np.ndarray, "B C"],
    model: Transformer,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
) -> None:
    """Raises ValueError for losses that are not finite, and says where they come from."""
    bad = ~np.isfinite(losses).all(axis=1)
    if bad.any():
        raise not_finite("the losses of the text", model, params, tokens[np.argmax(bad)])
