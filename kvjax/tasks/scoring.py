"""Answers and perplexity of a model on a known text, by one forward pass without a cache.

An answer is the argmax at every answer position, given the right tokens before it: teacher forcing.
The whole answer and the end-of-sequence token are right exactly when greedy decoding writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.decoding import NO_TOKEN, most_likely
from kvjax.example import Example
from kvjax.feeding import not_finite
from kvjax.nn import Transformer

BUCKET = 128  # lengths are rounded up to a multiple of this, so that few shapes compile


def accuracy(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> float:
    """The share of examples with every token of the answer right, and the end-of-sequence token."""
    found = predictions(model, params, examples, eos_id, batch_size)
    right = [ids == [*example.answer, eos_id] for ids, example in zip(found, examples, strict=True)]
    return float(np.mean(right)) if right else float("nan")


def predictions(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> list[list[int]]:
    """The teacher-forced answer of every example, and the token after it.

    Args:
        batch_size: examples in one forward pass.

    Returns:
        len(answer) + 1 ids for each example; the last one is `eos_id` if the model ends there.

    Raises:
        ValueError: logits that are not finite.
    """
    longest_answer = max((len(example.answer) for example in examples), default=0) + 1
    out: list[list[int]] = []
    for first in range(0, len(examples), batch_size):
        chunk = examples[first : first + batch_size]
        rows = [[*example.prompt, *example.answer, eos_id] for example in chunk]
        T = -(-max(map(len, rows)) // BUCKET) * BUCKET
        # Rows of the last batch without an example are padding; so all batches have one shape.
        tokens = np.full((batch_size, T), eos_id, np.int32)
        positions = np.full((batch_size, T), -1, np.int32)
        at = np.zeros((batch_size, longest_answer), np.int32)
        for index, (row, example) in enumerate(zip(rows, chunk, strict=True)):
            tokens[index, : len(row)] = row
            positions[index, : len(row)] = np.arange(len(row))
            # The token at position p is predicted at p − 1.
            count = len(example.answer) + 1
            at[index, :count] = len(example.prompt) - 1 + np.arange(count)
        arrays = jnp.asarray(tokens), jnp.asarray(positions)
        logits, _ = model.apply({"params": params}, *arrays)
        found = np.asarray(_most_likely(logits, at))
        for index, example in enumerate(chunk):
            answer = found[index, : len(example.answer) + 1].tolist()
            if NO_TOKEN in answer:
                raise not_finite(
                    f"the logits of example {first + index}", model, params, rows[index]
                )
            out.append(answer)
    return out


@jax.jit
def _most_likely(logits: Float[Array, "B T V"], at: Int[Array, "B A"]) -> Int[Array, "B A"]:
    """The most likely next token after each position `at`."""
    return jnp.take_along_axis(most_likely(logits), at, axis=1)


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
        batches: int32 [B, T] each. B and T may differ; each shape compiles once.

    Raises:
        ValueError: no batch, or only chunks of one token, which leave nothing to predict; or losses
            that are not finite.
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
