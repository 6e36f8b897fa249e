"""Feeds known text to the model one layer at a time, and computes the losses of its tokens.

`hidden_states` compiles only blocks. Programs that use the last layer's output compute a few rows
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
from kvjax.nn.transformer import block_kinds, embed_tokens, hidden_logits, output_params, run_layer

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


def output_weights(model: Transformer, params: Any) -> dict[str, Any]:
    """The parameters after the last layer, which `hidden_logits` reads."""
    return {name: params[name] for name in output_params(model.config)}


ROWS = 64  # [ROWS, V] logits are in memory at a time


@functools.partial(jax.jit, static_argnums=0)
def next_token_losses(
    model: Transformer,
    params: Mapping[str, Any],
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood, in nats, of every token except the first of each sequence; fp32.

    Args:
        params: parameters of `model`; only `output_params` are read.
        hidden: output of the last layer.
    """
    # All rows of all texts as one list, padded to whole chunks.
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


def not_finite(
    what: str, model: Transformer, params: Any, tokens: Sequence[int] | np.ndarray
) -> ValueError:
    """The error for results that are NaN or infinite.

    Args:
        what: the result, in the plural: "the logits of prompt 3".
        tokens: ids that the model reads again, layer by layer, to find where the numbers overflow.
    """
    return ValueError(f"{what} are not finite: {explain(model, params, tokens)}")


def explain(model: Transformer, params: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Names the first parameter with NaN or infinity, otherwise the first layer that overflows.

    In float16 a residual stream above 65504 becomes infinite, and NaN after the next norm.
    """
    dtype = params["embedding"].dtype.name
    advice = "; load the model as bfloat16 or float32" if dtype == "float16" else ""
    for name in params:
        broken = first_not_finite(params[name], f"{name}/")
        if broken is not None:
            return f"{broken} has NaN or infinity in {dtype}{advice}"
    ids = jnp.asarray(np.asarray(tokens, np.int32)[None])
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    lengths = jnp.full((1,), ids.shape[1], jnp.int32)
    x: Any = model.apply({"params": params}, ids, method="embed")
    for index, layer in enumerate(model.config.layers):
        args = (index, x, positions, NoCache(), lengths)
        x = model.apply({"params": params}, *args, method="layer")[0]
        if first_not_finite(x) is not None:
            kind = type(layer.attention).__name__.removesuffix("Config")
            return f"{dtype} overflows in layer {index} ({kind}){advice}"
    return f"{dtype} overflows in the output logits, or in what was decoded{advice}"
