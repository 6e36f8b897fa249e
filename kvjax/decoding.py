"""One token after the other: the choice of a token, a step of decoding, and the loop over steps."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from kvjax.cache import ModelCache, advance, rope_lengths_of, with_layer
from kvjax.cache.layers import scheduled
from kvjax.config import ModelConfig
from kvjax.mesh import Layout, automatic_axes, on_automatic_mesh, put_rows
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kinds, embed_tokens, hidden_logits, output_params, run_layer
from kvjax.ranges import NOT_NEGATIVE, Range, check_ranges

NO_TOKEN = -1
"""Stands where logits are not finite: without it the answer would be token 0 for ever."""
RANGES = {
    "temperature": NOT_NEGATIVE,
    "top_k": Range(least=0, whole=True),
    "top_p": Range(above=0, most=1),
}
ALL = 2**31 - 1
"""A top_k that no vocabulary has more tokens than."""


@flax.struct.dataclass
class Sampling:
    """Settings as arrays, so that changing them compiles nothing anew.

    Attributes:
        temperature: fp32 scalar; 0 is greedy.
        top_k: int32 scalar; only the k most likely tokens, 0 for all.
        top_p: fp32 scalar; only the most likely tokens that together reach this probability
            (nucleus sampling, arXiv 1904.09751), after top-k.
    """

    temperature: Any
    top_k: Any
    top_p: Any

    @classmethod
    def create(cls, temperature: float, top_k: int, top_p: float) -> Sampling:
        """Checked settings.

        Raises:
            ValueError: a setting outside of its range.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_ranges(given, RANGES)
        return cls(
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(min(top_k, ALL), jnp.int32),
            jnp.asarray(top_p, jnp.float32),
        )


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"] | UInt32[Array, "B _"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a sequence, int32; each with its own key, so that rows don't see each other.

    NO_TOKEN where a logit is not finite.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    token_B = jax.lax.cond(
        sampling.temperature > 0,
        lambda: jax.vmap(_sample_row, (0, 0, None))(logits_BV, keys_B, sampling),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )
    return jnp.where(finite_rows(logits_BV), token_B, jnp.int32(NO_TOKEN))


def most_likely(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The id with the largest logit, int32; NO_TOKEN where a logit is not finite."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(finite_rows(logits), best, jnp.int32(NO_TOKEN))


def finite_rows(logits: Float[Array, "*rows V"]) -> Bool[Array, "*rows"]:
    """Whether all numbers of a row are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _sample_row(logits_V: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    order = jnp.argsort(logits_V, descending=True)
    ranked = logits_V[order] / jnp.maximum(sampling.temperature, 1e-6)
    rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
    ranked = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked)
    before = jnp.cumsum(probs) - probs  # probability of all more likely tokens; 0 for the first
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)


LOOK_BEHIND = 2
"""Steps that are under way while the host reads a token, so that the device never waits for it."""
FUSED_FROM = 256
"""New tokens from which on accelerators compile a whole step: one call, but minutes to compile."""


@automatic_axes()
def decode_step(
    model: Transformer,
    params: Any,
    cache: Any,
    token: Int[Array | np.ndarray, " B"],
    live: Bool[Array | np.ndarray, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """The next logits of every sequence.

    Called as it is, it dispatches one compiled program for each layer, which layers of a kind
    share. Under `jax.jit` the same code is one program; donate the cache then.

    >>> logits, cache = kvjax.decode_step(model, params, cache, token)

    Args:
        cache: from `kvjax.prefill`, a list from `model.init_cache`, or the result of the step
            before. It is written in place: the one that was passed must not be used again.
        token: [B] int32, the newest token of each sequence, which is not in the cache yet.
        live: [B] bool, False for sequences that have ended: they store nothing more. None: all
            are live.

    Returns:
        Logits fp32, and the cache with the token. Beyond the cache's capacity a token is dropped,
        and the cache's lengths exceed its capacity.
    """
    params = on_automatic_mesh(params)
    config, rope_lengths = model.config, rope_lengths_of(cache)
    start = (params["embedding"], token, cache[0].lengths, live)
    x, positions, lengths = embed_step(config, *start)
    kinds = block_kinds(config)
    heads = [kind.block.layer.attention.query_heads for kind in kinds]
    cache = scheduled(cache, positions, heads)
    for index, kind in enumerate(kinds):
        name = f"layers_{index}"
        arrays = (params[name], x, positions, cache[index], rope_lengths)
        with jax.named_scope(name):
            x, entry = run_layer(kind, *arrays, donate=True)
        cache = with_layer(cache, index, entry)
    top = {name: params[name] for name in output_params(config)}
    layout = cache.layout if isinstance(cache, ModelCache) else None
    return step_logits(config, layout, top, x), advance(cache, lengths)


@functools.partial(jax.jit, static_argnums=0)
def embed_step(
    config: ModelConfig,
    embedding: Float[Array, "V D"],
    token: Int[Array | np.ndarray, " B"],
    lengths: Int[Array, " B"],
    live: Bool[Array | np.ndarray, " B"] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step's embeddings [B, 1, D], positions [B, 1], and the lengths after it."""
    positions = lengths if live is None else jnp.where(live, lengths, -1)
    x = embed_tokens(config, embedding, jnp.asarray(token)[:, None])
    return x, positions[:, None], lengths + (positions >= 0).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def step_logits(
    config: ModelConfig, layout: Layout | None, params: Any, x: Float[Array, "B 1 D"]
) -> Float[Array, "B V"]:
    """The step's logits; on a mesh each device has those of its sequences."""
    logits = hidden_logits(config, params, x)[:, 0]
    if layout is None:
        return logits
    if config.vocab_size % layout.ways == 0:
        # Each device makes its share first: XLA would rather gather the matrix than the logits.
        logits = layout.place(logits, "batch", "tensor")
    return layout.place(logits, "batch")


@flax.struct.dataclass
class DecodeState:
    """State of the loop over steps.

    Attributes:
        cache: see `decode_step`.
        token: [B] the newest token, not yet in the cache.
        finished: [B] an EOS was produced, or NO_TOKEN.
        step: [] tokens produced so far.
        keys: [B] random keys, one a sequence.
        layout: of the batch on a mesh; None for one device.
    """

    cache: Any
    token: Any
    finished: Any
    step: Any
    keys: Any
    layout: Layout | None = flax.struct.field(pytree_node=False, default=None)


def first_token(
    logits: Float[Array, "B V"],
    keys: Any,
    sampling: Sampling,
    eos: Int[np.ndarray, " E"],
    mesh: Mesh | None = None,
) -> DecodeState:
    """The state after the token that the prompt itself predicts; it has no cache yet.

    Args:
        mesh: of the parameters.
    """
    B = logits.shape[0]
    layout = None if mesh is None else Layout.create(mesh, B)
    start = DecodeState(
        cache=None,
        token=np.zeros(B, np.int32),
        finished=np.zeros(B, bool),
        step=np.int32(0),
        keys=keys,
        layout=layout,
    )
    # Where those of later tokens lie: one program samples all of them.
    logits, state = put_rows((logits, start), logits.sharding, layout)
    return push_token(state, logits, sampling, jnp.asarray(eos))


@jax.jit
def push_token(
    state: DecodeState, logits: Float[Array, "B V"], sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """Samples the next token of every sequence; `state` is without its cache."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = sample(logits, keys, sampling)
    if state.layout is not None:
        token = state.layout.place(token, "batch")
    ends = (token == NO_TOKEN) | jnp.any(token[:, None] == eos[None], axis=1)
    return replace(state, token=token, finished=state.finished | ends, step=state.step + 1)


def next_state(
    model: Transformer, params: Any, state: DecodeState, sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """One step: the newest token goes into the cache, and the next one is sampled."""
    live = ~state.finished
    logits, cache = decode_step(model, params, state.cache, state.token, live)
    pushed = push_token(replace(state, cache=None), logits, sampling, eos)
    return replace(pushed, cache=cache)


def fused_next_state(
    model: Transformer, params: Any, state: DecodeState, sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """`next_state` as one program; of the state only the cache is written in place, because the
    host has yet to read its token."""
    rest = replace(state, cache=None)
    return _whole_step(model, params, state.cache, rest, sampling, eos)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _whole_step(
    model: Transformer, params: Any, cache: Any, state: DecodeState, sampling: Sampling, eos: Any
) -> DecodeState:
    return next_state(model, params, replace(state, cache=cache), sampling, eos)


COMPILE = {"block": next_state, "step": fused_next_state}
"""What a step of decoding compiles: a program a kind of layer, or one for all of it."""


def step_function(compile: str | None, max_new_tokens: int) -> Callable[..., DecodeState]:
    """`next_state`, compiled as asked.

    Args:
        compile: "block" or "step"; None: "step" on accelerators for so many tokens that it pays.

    Raises:
        ValueError: something else.
    """
    if compile is None:
        long = jax.default_backend() != "cpu" and max_new_tokens >= FUSED_FROM
        compile = "step" if long else "block"
    if compile not in COMPILE:
        raise ValueError(
            f"compile is {compile!r}, expected None, {' or '.join(map(repr, COMPILE))}"
        )
    return COMPILE[compile]


def decode(
    model: Transformer,
    params: Any,
    state: DecodeState,
    sampling: Sampling,
    eos: Int[np.ndarray, " E"],
    max_new_tokens: int,
    every: int = 0,
    again: Callable[[Any], Any] | None = None,
    compile: str | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the tokens [B] of each step, until every sequence has ended.

    The host reads a token LOOK_BEHIND steps after it has asked for it. The number is fixed, so
    that all processes of several hosts ask for the same steps.

    Args:
        state: from `first_token`, with a cache. Do not use it again.
        every, again: `again` compresses the cache whenever it has so many more tokens. The newest
            token is not in the cache yet: after n tokens the cache holds n − 1 of them.
        compile: see `step_function`.
    """
    step, eos_ids = step_function(compile, max_new_tokens), jnp.asarray(eos)
    pending, ended = deque([state.token]), np.zeros(state.token.shape[0], bool)
    state.token.copy_to_host_async()
    for count in range(1, max_new_tokens):
        if every and count > 1 and (count - 1) % every == 0:
            assert again is not None
            state = replace(state, cache=again(state.cache))
        state = step(model, params, state, sampling, eos_ids)
        state.token.copy_to_host_async()
        pending.append(state.token)
        if len(pending) > LOOK_BEHIND:
            token = np.asarray(pending.popleft())
            yield token
            ended |= np.isin(token, [*eos, NO_TOKEN])
            if ended.all():
                return
    for token in pending:
        token = np.asarray(token)
        yield token
        ended |= np.isin(token, [*eos, NO_TOKEN])
        if ended.all():
            return
