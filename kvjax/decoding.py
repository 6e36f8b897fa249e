"""The two programs of generation: prefill, and decode as one while_loop on a donated cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvjax.cache.room import repeat, with_room
from kvjax.headkv.plan import Plan, sliding_windows
from kvjax.mesh import Layout
from kvjax.nn import Transformer
from kvjax.sampling import NO_TOKEN, Sampling, sample

CHUNK = 512  # prompt tokens that a layer reads at a time


@flax.struct.dataclass
class DecodeState:
    """State of the decode loop.

    Attributes:
        cache: one cache a layer, see `kvjax.cache.with_layer`.
        token: [B] the newest token, not yet in the cache.
        finished: [B] an EOS was produced, or NO_TOKEN.
        output: [B, max_new_tokens] tokens so far.
        step: tokens produced so far.
        keys: [B] random keys, one a sequence.
        rope_lengths: [B] prompt + max_new_tokens, for RoPE rules that depend on the length.
        layout: of the batch on a mesh; None for one device.
    """

    cache: Any
    token: Any
    finished: Any
    output: Any
    step: Any
    keys: Any
    rope_lengths: Any
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)


@functools.partial(jax.jit, static_argnames=("model", "plan", "max_new_tokens", "chunk"))
def prefill(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    plan: Plan,
    max_new_tokens: int,
    chunk: int = CHUNK,
) -> tuple[jax.Array, Any]:
    """Reads the prompts layer by layer; each layer's cache is compressed as soon as it is full.

    Within a layer the tokens come in chunks: the keys and values of one layer exist at a time,
    and beside the residual stream no activations but a chunk's. The chunk changes no selection.

    Returns:
        Logits after the last token of each prompt [B, V] fp32, and one cache a layer with room
        for `max_new_tokens`.
    """
    B, T = tokens.shape
    x = embed_chunks(functools.partial(_call, model, params, "embed"), tokens, chunk, plan.between)
    rope_lengths = lengths + max_new_tokens
    caches = []
    for layer in range(model.config.num_layers):

        def read(x: jax.Array, layer: int = layer) -> tuple[jax.Array, Any]:
            call = functools.partial(_call, model, params, "layer", layer)
            cache = plan.start(layer, B, T, max_new_tokens, x.dtype)
            x, cache = read_layer(call, x, lengths, cache, rope_lengths, chunk, plan.between)
            return x, plan.finish(layer, cache, max_new_tokens)

        x, cache = in_one_piece(read, x, jnp.any(lengths > 0))
        caches.append(cache)
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _call(model, params, "unembed", x)[:, 0], plan.join(caches)


def embed_chunks(
    embed: Callable[[jax.Array], jax.Array],
    tokens: Int[Array, "B T"],
    chunk: int,
    place: Callable[[jax.Array], jax.Array],
) -> Float[Array, "B T D"]:
    """The prompts' embeddings, where `place` puts them; on a mesh a lookup in a table that is
    split gives all features on every device, so it is done a chunk at a time."""
    T = tokens.shape[1]
    if chunk >= T:
        return place(embed(tokens))

    def read(index: jax.Array, x: jax.Array) -> jax.Array:
        start = jnp.minimum(index * chunk, T - chunk)
        part = embed(jax.lax.dynamic_slice_in_dim(tokens, start, chunk, 1))
        return place(jax.lax.dynamic_update_slice_in_dim(x, part, start, 1))

    one = jax.eval_shape(embed, tokens)
    return jax.lax.fori_loop(0, -(-T // chunk), read, place(jnp.zeros(one.shape, one.dtype)))


def in_one_piece(
    read: Callable[[jax.Array], tuple[jax.Array, Any]], x: jax.Array, needed: jax.Array
) -> tuple[jax.Array, Any]:
    """read(x) as one step of the program, so that what it needs in between is gone after it.

    XLA's scheduler is free to make the empty caches of all layers before the first layer and to
    compress them all after the last one, which holds every layer's keys and values at once (on CPU
    it does). It moves nothing across the bounds of a branch.

    Args:
        needed: [] bool; False gives x and zeros, which nobody asks for: it keeps the branch.
    """

    def skip(x: jax.Array) -> tuple[jax.Array, Any]:
        _, cache = jax.eval_shape(read, x)
        return x, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)

    return jax.lax.cond(needed, read, skip, x)


def read_layer(
    call: Callable[..., tuple[jax.Array, Any]],
    x: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    cache: Any,
    rope_lengths: Int[Array, " B"],
    chunk: int,
    place: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer over the whole prompt, in chunks that end with the longest sequence.

    Args:
        call: (x, positions, cache, rope lengths) to (x, cache).
        chunk: tokens at a time; the last chunk may be shorter.
        place: puts x where it is to lie, see `Plan.between`.
    """
    T = x.shape[1]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    whole = T // chunk * chunk
    if chunk >= T:
        x, cache = call(x, positions, cache, rope_lengths)
        return place(x), cache

    def read(index: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, cache = state
        part = jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, 1)
        at = jax.lax.dynamic_slice_in_dim(positions, index * chunk, chunk, 1)
        part, cache = call(part, at, cache, rope_lengths)
        return place(jax.lax.dynamic_update_slice_in_dim(x, part, index * chunk, 1)), cache

    filled = jnp.minimum(-(-jnp.max(lengths) // chunk), whole // chunk)
    x, cache = jax.lax.fori_loop(0, filled, read, (x, cache))
    if whole < T:
        part, cache = call(x[:, whole:], positions[:, whole:], cache, rope_lengths)
        x = place(x.at[:, whole:].set(part))
    return x, cache


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


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def extend(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: list[Any],
    max_new_tokens: int,
) -> tuple[jax.Array, list[Any]]:
    """Reads more tokens after those of one sequence, which all of the batch go on from.

    Args:
        cache: one cache a layer, of a batch of one; they stay as they are.

    Returns:
        Logits after the last token of each sequence [B, V] fp32, and caches of the whole batch
        with room for `max_new_tokens`.
    """
    B, T = tokens.shape
    windows = sliding_windows(model.config)
    cache = [
        with_room(repeat(layer, B), T + max_new_tokens, window)
        for layer, window in zip(cache, windows, strict=True)
    ]
    before = cache[0].lengths
    steps = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(steps < lengths[:, None], before[:, None] + steps, -1)
    settings = {"logits_at": "last", "rope_lengths": before}
    result: Any = model.apply({"params": params}, tokens, positions, cache, **settings)
    logits, cache = result
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def compress_again(state: DecodeState, plan: Plan) -> DecodeState:
    """The caches cut down to their budgets, which gives room for `plan.every` new tokens."""
    caches = [plan.refresh(layer, cache) for layer, cache in enumerate(state.cache)]
    return replace(state, cache=plan.join(caches))


def push_token(
    state: DecodeState, logits: jax.Array, sampling: Sampling, eos: jax.Array
) -> DecodeState:
    """Samples the next token of every sequence and records it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    if state.layout is not None:
        # Sampling ranks all tokens of a sequence.
        logits = state.layout.place(logits, "batch")
    token = sample(logits, keys, sampling)
    ends = (token == NO_TOKEN) | jnp.any(token[:, None] == eos[None], axis=1)
    return replace(
        state,
        token=token,
        finished=state.finished | ends,
        output=jax.lax.dynamic_update_slice_in_dim(state.output, token[:, None], state.step, 1),
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "mesh"))
def first_token(
    logits, keys, sampling, eos, lengths, max_new_tokens: int, mesh: Mesh | None = None
) -> DecodeState:
    """The loop state after the token that the prompt itself predicts.

    It has no caches yet: without them the program is the same whatever the policy.

    Args:
        mesh: of the parameters.
    """
    B = logits.shape[0]
    state = DecodeState(
        cache=[],
        token=jnp.zeros((B,), jnp.int32),
        finished=jnp.zeros((B,), bool),
        output=jnp.zeros((B, max_new_tokens), jnp.int32),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        rope_lengths=lengths + max_new_tokens,
        layout=None if mesh is None else Layout.create(mesh, B),
    )
    return push_token(state, logits, sampling, eos)
