"""From the attention of the answer's steps to one number a head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.headkv.batches import Batch

Reduce = Callable[[jax.Array, Batch], jax.Array]
"""Attention of the steps [B, N, M, S] fp32 to one score a head [B, N]."""


def copied(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval heads (arXiv 2404.15574): steps whose most attended token is the next one.

    That token must stand in the span, whose length divides the count.
    """
    top = jnp.argmax(attention_BNMS, axis=-1)
    rows = jnp.arange(top.shape[0], dtype=jnp.int32)[:, None, None]
    hit = batch.span[rows, top] & (batch.tokens[rows, top] == batch.answers[:, None])
    count = jnp.sum(hit & batch.steps[:, None], axis=2, dtype=jnp.int32)
    return count.astype(jnp.float32) / span_length(batch)[:, None].astype(jnp.float32)


def attended(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval-reasoning heads (arXiv 2410.19258, eq. 2): attention on the span, if it ranks high.

    Summed over the steps and those tokens of the span that are among the N most attended ones,
    divided by N, the length of the span. Of equals the earlier position ranks higher.
    """
    length = span_length(batch)
    order = jnp.argsort(-attention_BNMS, axis=-1, stable=True)
    weight = jnp.take_along_axis(attention_BNMS, order, axis=-1)
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None, None, None]
    ranks = jnp.arange(order.shape[3], dtype=jnp.int32)[None, None, None]
    counts = batch.span[rows, order] & (ranks < length[:, None, None, None])
    counts &= batch.steps[:, None, :, None]
    total = jnp.sum(jnp.where(counts, weight, 0.0), axis=(2, 3))
    return total / length[:, None].astype(jnp.float32)


def induced(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Induction heads (arXiv 2209.11895): attention on the token of the span that comes next.

    The mean over the steps, in 0 … 1: 1 for a head that always looks at what followed the first
    time. A step's targets are the tokens of the span that equal the answer's token.
    """
    target = batch.span[:, None] & (batch.tokens[:, None] == batch.answers[..., None])
    target &= batch.steps[..., None]
    total = jnp.sum(jnp.where(target[:, None], attention_BNMS, 0.0), axis=(2, 3))
    count = jnp.sum(batch.steps, axis=1, dtype=jnp.int32)
    return total / count[:, None].astype(jnp.float32)


def span_length(batch: Batch) -> Int[Array, " B"]:
    """N, tokens of the span."""
    return jnp.sum(batch.span, axis=1, dtype=jnp.int32)
