"""Losses of a text's tokens: dense, in a sliding window, or after a compressed prefix."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from eval.loaded import bounds_growth
from kvjax.config import ModelConfig
from kvjax.feeding import hidden_states, output_weights
from kvjax.generation import Start, from_start
from kvjax.nn import Transformer
from kvjax.nn.transformer import hidden_logits
from kvjax.policies.policy import Policy
from kvjax.tasks.scoring import check_losses, chunk_losses

PIECE = 128  # tokens of a continuation that are fed at a time


def chunks(
    ids: Int[np.ndarray, " S"], length: int, stride: int, count: int | None = None
) -> Int[np.ndarray, "C T"]:
    """Stretches of `length` tokens, each `stride` after the one before; a rest is left out.

    Args:
        count: no more than so many.

    Raises:
        ValueError: a length that the text does not have, or a stride that leaves tokens out.
    """
    if not 2 <= length <= len(ids):
        raise ValueError(f"length is {length}, expected 2 to {len(ids)}: the tokens of the text")
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}, expected 1 to {length}: the length")
    return np.lib.stride_tricks.sliding_window_view(ids, length)[::stride][:count]


def dense(
    model: Transformer, params: Any, rows: Int[np.ndarray, "C T"], stride: int, batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Losses without a cache, for each batch one array a row: of all its tokens but the first.

    Args:
        stride: of the rows; what of a row an earlier one has scored already is left out.
    """
    length = rows.shape[1]
    for start, batch in _batches(rows, batch_size):
        losses = np.asarray(chunk_losses(model, params, jnp.asarray(batch)))
        check_losses(losses, model, params, batch)
        fresh = [row[-stride:] if stride < length else row for row in losses]
        if start == 0:
            fresh[0] = losses[0]
        yield fresh[: len(rows) - start]


def after_prefix(
    model: Transformer,
    params: Any,
    rows: Int[np.ndarray, "C T"],
    prefix: int,
    policies: Sequence[Policy],
    batch_size: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Losses of the tokens after the first `prefix`, which are read and then compressed.

    The prefill predicts the first of them, before anything is dropped; the compressed cache
    predicts the others.

    Returns:
        For each batch, and within one for each policy, the policy's index and an array a row.

    Raises:
        ValueError: a prefix that leaves nothing to score, or a policy that bounds the growth: its
            cache would change while a piece of the continuation is read.
    """
    if not 1 <= prefix < rows.shape[1]:
        raise ValueError(f"prefix is {prefix}, expected 1 to {rows.shape[1] - 1}")
    if any(map(bounds_growth, policies)):
        raise ValueError("perplexity after a prefix does not fit policies with ring or every")
    reader = from_start(model, params, policies)
    lengths = np.full(min(batch_size, len(rows)), prefix, np.int32)
    for first, batch in _batches(rows, batch_size):
        starts = reader.read(batch[:, :prefix], lengths, batch.shape[1] - prefix)
        for number, start in enumerate(starts):
            losses = continuation_losses(model, params, batch, prefix, start)
            yield number, list(losses)[: len(rows) - first]


def continuation_losses(
    model: Transformer, params: Any, tokens: Int[np.ndarray, "B T"], prefix: int, start: Start
) -> Float[np.ndarray, "B C"]:
    """Negative log-likelihood, in nats, of the tokens from `prefix` on.

    Args:
        start: the tokens before them, read and compressed; its cache is used up.
    """
    (B, T), cache, top = tokens.shape, start.cache, output_weights(model, params)
    found = [_cross_entropy(start.logits[:, None], tokens[:, prefix : prefix + 1])]
    for at in range(prefix, T - 1, PIECE):
        count = min(PIECE, T - 1 - at)
        fed = np.zeros((B, PIECE), np.int32)
        wanted, positions = np.zeros_like(fed), np.full_like(fed, -1)
        fed[:, :count] = tokens[:, at : at + count]
        wanted[:, :count] = tokens[:, at + 1 : at + 1 + count]
        positions[:, :count] = np.arange(at, at + count)
        x, cache = hidden_states(model, params, fed, positions, cache)
        found.append(_losses(model.config, top, x, wanted)[:, :count])
    losses = np.concatenate([np.asarray(part) for part in found], axis=1)
    check_losses(losses, model, params, tokens)
    return losses


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    config: ModelConfig, top: Any, x: Float[Array, "B P D"], wanted: Int[Array, "B P"]
) -> Float[Array, "B P"]:
    """Losses of what follows each token, from the last layer's output."""
    return _cross_entropy(hidden_logits(config, top, x), wanted)


@jax.jit
def _cross_entropy(logits: Float[Array, "B P V"], wanted: Int[Array, "B P"]) -> Float[Array, "B P"]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)


def perplexity_of(losses: list[np.ndarray]) -> dict[str, Any]:
    """exp of the mean loss of all tokens.

    The standard error takes rows as independent, not tokens (delta method): perplexity times the
    standard error of their means; None for one row.
    """
    every = np.concatenate(losses).astype(np.float64)
    value = math.exp(every.mean())
    n, error = len(losses), None
    if n > 1:
        means = [float(np.mean(row, dtype=np.float64)) for row in losses]
        error = value * float(np.std(means, ddof=1)) / math.sqrt(n)
    return {"score": value, "standard_error": error, "items": int(every.size)}


def _batches(
    rows: Int[np.ndarray, "C T"], batch_size: int
) -> Iterator[tuple[int, Int[np.ndarray, "B T"]]]:
    """Batches of one size; the last one is filled with its last row."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected ≥ 1")
    size = min(batch_size, len(rows))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        fill = np.repeat(batch[-1:], size - len(batch), axis=0)
        yield start, np.concatenate([batch, fill])
