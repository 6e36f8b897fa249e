"""Next-token losses from hidden states, a few rows of the vocabulary's width at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kvjax.nn.transformer import Transformer, hidden_logits

ROWS = 64  # logits [ROWS, V] exist at a time


@functools.partial(jax.jit, static_argnums=0)
def next_token_losses(
    model: Transformer,
    params: Mapping[str, Any],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood, in nats, of every token but the first of each sequence; fp32.

    Args:
        params: of `model`; only those of `output_params` are read.
        hidden: output of the last layer.
    """
    count = tokens[:, 1:].size
    rows = min(ROWS, count)
    missing = -count % rows
    x = jnp.pad(hidden[:, :-1].reshape(count, -1), ((0, missing), (0, 0)))
    labels = jnp.pad(tokens[:, 1:].reshape(count), (0, missing))

    def losses(chunk):
        x, labels = chunk
        logits = hidden_logits(model.config, params, x[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    parts = jax.lax.map(losses, (x.reshape(-1, rows, x.shape[-1]), labels.reshape(-1, rows)))
    return parts.reshape(-1)[:count].reshape(tokens.shape[0], -1)
