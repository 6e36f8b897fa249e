"""Feeds known text to the model one layer at a time, and judges its tokens.

`hidden_states` compiles only blocks. `judge` reads the last layer's output and computes a few rows
of logits at a time, so that no array holds all logits. `not_finite` feeds a text again to find the
layer where its numbers overflow.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.cache import NoCache, advance, rope_lengths_of, with_layer
from kvjax.checks import first_not_finite
from kvjax.config import ModelConfig
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.transformer import (
    block_kinds,
    embed,
    embed_tokens,
    hidden_logits,
    layer_output,
    most_likely,
    output_params,
    run_layer,
)

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]


@automatic_axes()
def hidden_states(
    model: Transformer,
    params: Any,
    tokens: Ids,
    positions: Ids | None = None,
    cache: Any = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """The last layer's output for each token; `hidden_logits` computes logits from it.

    Args:
        positions: −1 marks padding on the right; None: 0 … T − 1.
        cache: the cache that stores the tokens. It is written in place: do not use the passed
            cache again. None: each row is a separate text.

    Returns:
        The hidden states, and the cache with the tokens.
    """
    params, config = on_automatic_mesh(params), model.config
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    tokens, positions = jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)
    # Pools count the tokens after the last layer, so take the old lengths first.
    held = None if cache is None else cache[0].lengths
    x, lengths = _embed(config, params["embedding"], tokens, positions, held)
    rope_lengths = lengths if cache is None else rope_lengths_of(cache)
    for index, kind in enumerate(block_kinds(config)):
        entry = NoCache() if cache is None else cache[index]
        own, donate = params[f"layers_{index}"], cache is not None
        x, entry = run_layer(kind, own, x, positions, entry, rope_lengths, donate)
        if cache is not None:
            cache = with_layer(cache, index, entry)
    return x, None if cache is None else advance(cache, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    config: ModelConfig,
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None,
) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
    """Embeddings, and the tokens that each sequence has given, these included. Without a cache the
    second result is the length of each text."""
    x = embed_tokens(config, embedding, tokens)
    if lengths is None:
        return x, jnp.max(positions, axis=1) + 1
    return x, lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


LOGITS = 2**24
"""Largest number of logits that exist at a time, 64 MB in fp32, unless one token of each text has
more."""


@automatic_axes()
def judge(
    model: Transformer, params: Mapping[str, Any], hidden: Float[Array, "B T D"], wanted: Ids
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Judges, after each fed token, the token that follows.

    Args:
        params: parameters of `model`; only `output_params` are read.
        hidden: output of the last layer.
        wanted: the token that follows each fed one; −1 where none is judged.

    Returns:
        The negative log-likelihood of each wanted token in nats, fp32 (0 where none is judged), and
        the most likely token after each fed one, NO_TOKEN where its logits are not finite.
    """
    top = on_automatic_mesh({name: params[name] for name in output_params(model.config)})
    return _judge(model.config, top, hidden, jnp.asarray(wanted, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _judge(
    config: ModelConfig, top: Any, hidden: Float[Array, "B T D"], wanted: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """`judge` in slices of the texts."""
    B, T = wanted.shape
    # Slices are cut along T: on a mesh the batch axis is sharded.
    size = max(1, min(T, LOGITS // (B * config.vocab_size)))
    count = -(-T // size)

    def cut(leaf: jax.Array) -> jax.Array:
        """[B, T, …] → [count, B, size, …]."""
        pad = [(0, 0), (0, count * size - T)] + [(0, 0)] * (leaf.ndim - 2)
        return jnp.moveaxis(jnp.pad(leaf, pad).reshape(B, count, size, *leaf.shape[2:]), 1, 0)

    def judge_slice(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, labels = chunk
        logits = hidden_logits(config, top, x)
        # Small losses keep their digits where the largest logit is 0.
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(shifted, jnp.maximum(labels, 0))
        return jnp.where(labels >= 0, losses, 0.0), most_likely(logits)

    slices = jax.lax.map(judge_slice, (cut(hidden), cut(wanted)))
    losses, likely = (jnp.moveaxis(leaf, 0, 1).reshape(B, -1)[:, :T] for leaf in slices)
    return losses, likely


def not_finite(
    what: str, model: Transformer, params: Any, tokens: Sequence[int] | np.ndarray
) -> ValueError:
    """The error for results that are NaN or infinite.

    Args:
        what: the result, in the plural: "the logits of prompt 3".
        tokens: ids that the model reads again, layer by layer, to find where the numbers overflow.
    """
    return ValueError(f"{what} are not finite: {explain(model, params, tokens)}")


@automatic_axes()
def explain(model: Transformer, params: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Names the first parameter with NaN or infinity, otherwise the first layer that overflows.

    In float16 a residual stream above 65504 becomes infinite, and NaN after the next norm.
    """
    params = on_automatic_mesh(params)
    dtype = params["embedding"].dtype.name
    advice = "; load the model as bfloat16 or float32" if dtype == "float16" else ""
    for name in params:
        broken = first_not_finite(params[name], f"{name}/")
        if broken is not None:
            return f"{broken} has NaN or infinity in {dtype}{advice}"
    x = embed(model.config, params, np.asarray(tokens, np.int32)[None])
    for index, kind in enumerate(block_kinds(model.config)):
        x = layer_output(kind, params[f"layers_{index}"], x)
        if first_not_finite(x) is not None:
            attention = type(kind.block.layer.attention).__name__.removesuffix("Config")
            return f"{dtype} overflows in layer {index} ({attention}){advice}"
    return f"{dtype} overflows in the output logits, or in what was decoded{advice}"
