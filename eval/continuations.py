"""Log-likelihoods of continuations of different lengths, from compressed contexts or dense."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eval.loaded import bounds_growth
from kvjax.cache import cache_bytes
from kvjax.config import ModelConfig
from kvjax.decoding import most_likely
from kvjax.feeding import hidden_states, output_weights
from kvjax.generation import full_cache_bytes
from kvjax.nn import Transformer
from kvjax.nn.transformer import hidden_logits
from kvjax.numerics import not_finite
from kvjax.policies.policy import Policy
from kvjax.prefill import prefill
from kvjax.prompts import bucket_length, pad

PIECE = 64  # tokens of a continuation that are fed at a time


@dataclass(frozen=True)
class Scored:
    """Log-likelihoods of a batch.

    Attributes:
        log_likelihood: [B] nats, the sum over a continuation's tokens.
        greedy: [B] every token is the most likely one.
        cache_bytes, full_cache_bytes: of the whole batch, with room for the continuations; without
            a cache, what an uncompressed one would hold.
    """

    log_likelihood: Float[np.ndarray, " B"]
    greedy: Bool[np.ndarray, " B"]
    cache_bytes: int
    full_cache_bytes: int


def compressed(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    policy: Policy,
) -> Scored:
    """Reads and compresses the contexts but for their last token, which is fed again with the rest.

    So every token is predicted from the compressed cache; after a whole prefill the first of them,
    for many tasks the only one, would be the uncompressed model's. Contexts of one token, which
    leave nothing to compress, are read whole. Both texts are at least one token.
    """
    reads = [list(context[:-1] or context) for context in contexts]
    rests = [[*a[len(r) :], *b] for a, b, r in zip(contexts, continuations, reads, strict=True)]
    alone = [len(context) == 1 for context in contexts]
    longest = max(map(len, rests))
    room = -(-longest // PIECE) * PIECE
    bucket = min(bucket_length(max(map(len, reads))), model.config.context_length)
    tokens, lengths = pad(reads, bucket)
    logits, cache = prefill(model, params, tokens, lengths, policy, max_new_tokens=room)
    held = cache_bytes(cache)
    fed = np.full((len(reads), room + 1), -1, np.int32)
    for row, ids in enumerate(rests):
        fed[row, : len(ids)] = ids
    first = np.where(np.asarray(alone)[:, None], fed[:, :1], -1).astype(np.int32)
    total, greedy = _judge_logits(logits[:, None], first)
    top = output_weights(model, params)
    for start in range(0, longest - 1, PIECE):
        piece, after = (fed[:, at : at + PIECE] for at in (start, start + 1))
        positions = lengths[:, None] + np.arange(start, start + PIECE)
        positions = np.where(after >= 0, positions, -1).astype(np.int32)
        x, cache = hidden_states(model, params, np.maximum(piece, 0), positions, cache)
        more, right = _judge(model.config, top, x, after)
        total, greedy = total + more, greedy & right
    full = full_cache_bytes(model, params, (len(reads), bucket), room)
    sums = _checked(np.asarray(total), model, params, contexts, continuations)
    return Scored(sums, np.asarray(greedy), held, full)


def dense(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> Scored:
    """The same in one forward pass without a cache."""
    rows = [[*a, *b] for a, b in zip(contexts, continuations, strict=True)]
    bucket = min(bucket_length(max(map(len, rows))), model.config.context_length + 1)
    tokens = np.zeros((len(rows), bucket), np.int32)
    wanted = np.full((len(rows), bucket - 1), -1, np.int32)
    for row, (ids, context) in enumerate(zip(rows, contexts, strict=True)):
        tokens[row, : len(ids)] = ids
        wanted[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
    x, _ = hidden_states(model, params, tokens[:, :-1])
    total, greedy = _judge(model.config, output_weights(model, params), x, wanted)
    full = full_cache_bytes(model, params, (len(rows), bucket), 0)
    sums = _checked(np.asarray(total), model, params, contexts, continuations)
    return Scored(sums, np.asarray(greedy), full, full)


def _checked(
    sums: Float[np.ndarray, " B"],
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> Float[np.ndarray, " B"]:
    """The log-likelihoods; raises ValueError for those that are not finite."""
    bad = ~np.isfinite(sums)
    if bad.any():
        row = int(np.argmax(bad))
        ids = [*contexts[row], *continuations[row]]
        raise not_finite("the log-likelihoods", model, params, ids)
    return sums


def check_feedable(policy: Policy) -> None:
    """Raises ValueError for policies whose cache changes while a continuation is fed."""
    if bounds_growth(policy):
        raise ValueError("log-likelihoods do not fit policies with ring or every")


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    config: ModelConfig, top: Any, x: Float[Array, "B P D"], wanted: Int[Array, "B P"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`_judge_logits` of the last layer's output."""
    return _judge_logits(hidden_logits(config, top, x), wanted)


@jax.jit
def _judge_logits(
    logits: Float[Array, "B P V"], wanted: Int[Array, "B P"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sum of log-probabilities where something is wanted, and whether all of it is the argmax."""
    asked = wanted >= 0
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
    right = (most_likely(logits) == wanted) | ~asked
    return jnp.where(asked, chosen, 0.0).sum(axis=-1), right.all(axis=-1)
