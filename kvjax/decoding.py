"""The two programs of generation: prefill, and decode as one while_loop on a donated cache."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.headkv.plan import Plan
from kvjax.nn import Transformer
from kvjax.sampling import Sampling, sample


@flax.struct.dataclass
class DecodeState:
    """State of the decode loop.

    Attributes:
        cache: one cache a layer.
        token: [B] the newest token, not yet in the cache.
        finished: [B] an EOS was produced.
        output: [B, max_new_tokens] tokens so far.
        step: tokens produced so far.
        keys: [B] random keys, one a sequence.
        rope_lengths: [B] prompt + max_new_tokens, for RoPE rules that depend on the length.
    """

    cache: list[Any]
    token: Any
    finished: Any
    output: Any
    step: Any
    keys: Any
    rope_lengths: Any


@functools.partial(jax.jit, static_argnames=("model", "plan", "max_new_tokens"))
def prefill(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    plan: Plan,
    max_new_tokens: int,
) -> tuple[jax.Array, list[Any]]:
    """Reads the prompts a layer at a time; each layer's cache is compressed as soon as it is full.

    Returns:
        Logits after the last token of each prompt [B, V] fp32, and one cache a layer with room
        for `max_new_tokens`.
    """
    call = functools.partial(_call, model, params)
    B, T = tokens.shape
    steps = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(steps < lengths[:, None], steps, -1)
    rope_lengths = lengths + max_new_tokens
    x = call("embed", tokens)
    caches = []
    for layer in range(model.config.num_layers):
        cache = plan.start(layer, B, T, max_new_tokens, x.dtype)
        x, cache = call("layer", layer, x, positions, cache, rope_lengths)
        caches.append(plan.finish(layer, cache, max_new_tokens))
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return call("unembed", x)[:, 0], caches


def _call(model: Transformer, params: Any, method: str, *args: Any) -> Any:
    """One of the model's methods."""
    return model.apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: Transformer,
    params: Any,
    state: DecodeState,
    sampling: Sampling,
    eos: Int[Array, " E"],
    limit: Int[Array, ""],
) -> DecodeState:
    """Decodes until `limit` tokens are produced or every sequence has finished."""

    def unfinished(state: DecodeState):
        return (state.step < limit) & ~jnp.all(state.finished)

    def step(state: DecodeState) -> DecodeState:
        # A finished sequence stores nothing more.
        positions = jnp.where(state.finished, -1, state.cache[0].lengths)[:, None]
        logits, cache = model.apply(
            {"params": params},
            state.token[:, None],
            positions,
            state.cache,
            rope_lengths=state.rope_lengths,
        )
        return push_token(replace(state, cache=cache), logits[:, 0], sampling, eos)

    return jax.lax.while_loop(unfinished, step, state)


def push_token(
    state: DecodeState, logits: jax.Array, sampling: Sampling, eos: jax.Array
) -> DecodeState:
    """Samples the next token of every sequence and records it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = sample(logits, keys, sampling)
    return replace(
        state,
        token=token,
        finished=state.finished | jnp.any(token[:, None] == eos[None], axis=1),
        output=jax.lax.dynamic_update_slice(state.output, token[:, None], (0, state.step)),
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames="max_new_tokens", donate_argnames="cache")
def first_token(logits, cache, keys, sampling, eos, lengths, max_new_tokens: int) -> DecodeState:
    """The loop state after the token that the prompt itself predicts."""
    B = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros((B,), jnp.int32),
        finished=jnp.zeros((B,), bool),
        output=jnp.zeros((B, max_new_tokens), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        rope_lengths=lengths + max_new_tokens,
    )
    return push_token(state, logits, sampling, eos)
