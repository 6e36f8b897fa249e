"""One token after the other: a step of decoding, the loop over steps, and the choice of a token."""

from __future__ import annotations

import functools
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
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
from kvjax.checks import NOT_NEGATIVE, Range, check_ranges
from kvjax.config import ModelConfig
from kvjax.mesh import Placement, automatic_axes, on_automatic_mesh, put_rows
from kvjax.nn import Transformer
from kvjax.nn.transformer import (
    NO_TOKEN,
    block_kinds,
    embed_tokens,
    finite_rows,
    hidden_logits,
    output_params,
    run_layer,
)

RANGES = {
    "temperature": NOT_NEGATIVE,
    "top_k": Range(least=0, whole=True),
    "top_p": Range(above=0, most=1),
}
ALL = 2**31 - 1
"""The largest top_k: no vocabulary has more tokens."""
LOOK_BEHIND = 2
"""Steps in flight while the host reads a token, so that the device never waits for the host."""
FUSED_FROM = 256
"""On accelerators, compile a whole step as one program from this many new tokens on: faster steps,
but minutes to compile."""


@automatic_axes()
def decode_step(
    model: Transformer,
    params: Any,
    cache: Any,
    token: Int[Array | np.ndarray, " B"],
    live: Bool[Array | np.ndarray, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """The next logits of every sequence.

    Called outside `jax.jit`, it dispatches one compiled program per layer; layers of a kind share
    their program. Under `jax.jit` the whole step is one program; donate the cache then.

    Examples:
        >>> logits, cache = kvjax.prefill(model, params, tokens, lengths)
        >>> token = logits.argmax(-1).astype("int32")
        >>> logits, cache = kvjax.decode_step(model, params, cache, token)

    Args:
        cache: from `kvjax.prefill`, a list from `model.init_cache`, or the result of the previous
            step. The cache is written in place: do not use the passed cache again.
        token: [B] int32, the newest token of each sequence, which is not in the cache yet.
        live: [B] bool, False for sequences that have ended. They store nothing more, their entries
            are not read, and their logits mean nothing. None: all are live.

    Returns:
        Logits fp32, and the cache with the token. A token beyond the cache's capacity is dropped,
        and the cache's lengths then exceed its capacity.

    Raises:
        ValueError: tokens of another shape or dtype.
    """
    check_token(cache, token)
    return step_layers(model, on_automatic_mesh(params), cache, token, live)


def check_token(cache: Any, token: Any) -> None:
    """Raises ValueError unless there is one integer for each sequence of the cache."""
    batch, shape = cache[0].lengths.shape, getattr(token, "shape", None)
    if shape != batch or not jnp.issubdtype(token.dtype, jnp.integer):
        kind = f"{token.dtype} {shape}" if shape is not None else type(token).__name__
        raise ValueError(f"got token {kind}, expected integers {batch}: one for each sequence")


def step_layers(
    model: Transformer, params: Any, cache: Any, token: Any, live: Any
) -> tuple[Float[Array, "B V"], Any]:
    """`decode_step` for parameters that are on a mesh with automatic axes, or on one device."""
    config, rope_lengths = model.config, rope_lengths_of(cache)
    start = (params["embedding"], token, cache[0].lengths, live)
    x, positions, lengths = embed_step(config, *start)
    # The kernels of all layers read the same rows for this step: list them once.
    kinds = block_kinds(config)
    heads = [kind.block.layer.attention.query_heads for kind in kinds]
    cache = scheduled(cache, positions, heads)
    for index, kind in enumerate(kinds):
        name = f"layers_{index}"
        arrays = (params[name], x, positions, cache[index], rope_lengths)
        with jax.named_scope(name):
            x, entry = run_layer(kind, *arrays, donate=True)
        cache = with_layer(cache, index, entry)
    # Only now do pools count the token: until here each layer needed the old lengths.
    top = {name: params[name] for name in output_params(config)}
    placement = cache.placement if isinstance(cache, ModelCache) else None
    return step_logits(config, placement, top, x), advance(cache, lengths)


@functools.partial(jax.jit, static_argnums=0)
def embed_step(
    config: ModelConfig,
    embedding: Float[Array, "V D"],
    token: Int[Array | np.ndarray, " B"],
    lengths: Int[Array, " B"],
    live: Bool[Array | np.ndarray, " B"] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The step's embeddings [B, 1, D], positions [B, 1], and the lengths after the step."""
    positions = lengths if live is None else jnp.where(live, lengths, -1)
    x = embed_tokens(config, embedding, jnp.asarray(token)[:, None])
    return x, positions[:, None], lengths + (positions >= 0).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def step_logits(
    config: ModelConfig, placement: Placement | None, params: Any, x: Float[Array, "B 1 D"]
) -> Float[Array, "B V"]:
    """The step's logits; on a mesh sharded over the sequences."""
    logits = hidden_logits(config, params, x)[:, 0]
    if placement is None:
        return logits
    if config.vocab_size % placement.ways == 0:
        # Each device computes its share of the vocabulary first. Without this constraint XLA
        # gathers the weight matrix instead of the logits.
        logits = placement.place(logits, "batch", "tensor")
    return placement.place(logits, "batch")


@flax.struct.dataclass
class DecodeState:
    """State of the loop over steps.

    Attributes:
        cache: see `decode_step`.
        token: [B] the newest token, not yet in the cache.
        finished: [B] whether the sequence produced an EOS or NO_TOKEN.
        step: [] tokens produced so far.
        keys: [B] random keys, one per sequence.
        placement: placement of the batch on a mesh; None for one device.
    """

    cache: Any
    token: Any
    finished: Any
    step: Any
    keys: Any
    placement: Placement | None = flax.struct.field(pytree_node=False, default=None)


def prompt_words(prompts: Sequence[Sequence[int]]) -> UInt32[np.ndarray, "B 2"]:
    """Two numbers that identify a prompt: a checksum, and how often it came before in the list."""
    # The count tells equal prompts apart, so that repeating a prompt gives new samples.
    seen: Counter[int] = Counter()
    words = []
    for prompt in prompts:
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        words.append((checksum, seen[checksum]))
        seen[checksum] += 1
    return np.asarray(words, np.uint32)


@jax.jit
def prompt_keys(key: jax.Array, words: UInt32[Array, "B 2"]) -> jax.Array:
    """[B] random keys from a key and the two numbers of each prompt."""

    def fold(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1])

    return jax.vmap(fold)(words)


def first_token(
    logits: Float[Array, "B V"],
    keys: Any,
    sampling: Sampling,
    eos: Int[np.ndarray, " E"],
    mesh: Mesh | None = None,
) -> DecodeState:
    """The state after the first new token, which prefill's logits give; it has no cache yet.

    Args:
        mesh: the mesh of the parameters; None for one device.
    """
    B = logits.shape[0]
    placement = None if mesh is None else Placement.create(mesh, B)
    start = DecodeState(
        cache=None,
        token=np.zeros(B, np.int32),
        finished=np.zeros(B, bool),
        step=np.int32(0),
        keys=keys,
        placement=placement,
    )
    # Use the sharding that later tokens have, so that one program samples all tokens.
    logits, state = put_rows((logits, start), logits.sharding, placement)
    return push_token(state, logits, sampling, jnp.asarray(eos))


@jax.jit
def push_token(
    state: DecodeState, logits: Float[Array, "B V"], sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """Samples the next token of every sequence; `state` must be without its cache."""
    # Random numbers depend on the sequence's key and the step, not on the rest of the batch.
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.step)
    token = sample(logits, keys, sampling)
    if state.placement is not None:
        token = state.placement.place(token, "batch")
    finished = state.finished | has_ended(token, eos)
    return replace(state, token=token, finished=finished, step=state.step + 1)


def next_state(
    model: Transformer, params: Any, state: DecodeState, sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """One step: stores the newest token in the cache and samples the next one."""
    live = ~state.finished
    logits, cache = step_layers(model, params, state.cache, state.token, live)
    pushed = push_token(replace(state, cache=None), logits, sampling, eos)
    return replace(pushed, cache=cache)


def fused_next_state(
    model: Transformer, params: Any, state: DecodeState, sampling: Sampling, eos: Int[Array, " E"]
) -> DecodeState:
    """`next_state` as one program. It writes only the cache in place: the host has yet to read the
    state's token."""
    rest = replace(state, cache=None)
    return _whole_step(model, params, state.cache, rest, sampling, eos)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _whole_step(
    model: Transformer, params: Any, cache: Any, state: DecodeState, sampling: Sampling, eos: Any
) -> DecodeState:
    return next_state(model, params, replace(state, cache=cache), sampling, eos)


COMPILE = {"block": next_state, "step": fused_next_state}
"""What one step of decoding compiles: a program per kind of layer, or one for the whole step."""


def step_function(compile: str | None, max_new_tokens: int) -> Callable[..., DecodeState]:
    """`next_state`, compiled as `compile` says.

    Args:
        compile: "block" or "step". None: "step" on accelerators for at least FUSED_FROM tokens,
            otherwise "block".

    Raises:
        ValueError: another value of `compile`.
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
    interval: int = 0,
    again: Callable[[Any], Any] | None = None,
    compile: str | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields the tokens [B] of each step, until every sequence has ended.

    The host reads a token LOOK_BEHIND steps after requesting it. The number is fixed, so that the
    processes of several hosts request the same steps.

    Args:
        state: from `first_token`, with a cache. Do not use it again.
        interval, again: `again` compresses the cache each time it has gained `interval` tokens.
            The newest token is not in the cache yet: after n tokens the cache holds n − 1 of them.
        compile: see `step_function`.
    """
    step, eos_ids = step_function(compile, max_new_tokens), jnp.asarray(eos)
    pending, ended = deque([state.token]), np.zeros(state.token.shape[0], bool)
    state.token.copy_to_host_async()
    for count in range(1, max_new_tokens):
        if interval and count > 1 and (count - 1) % interval == 0:
            assert again is not None
            state = replace(state, cache=again(state.cache))
        state = step(model, params, state, sampling, eos_ids)
        # Copy the token while later steps run, and read it when LOOK_BEHIND more are under way.
        state.token.copy_to_host_async()
        pending.append(state.token)
        if len(pending) > LOOK_BEHIND:
            token = np.asarray(pending.popleft())
            yield token
            ended |= has_ended(token, eos)
            if ended.all():
                return
    # All steps are dispatched: read the rest.
    for token in pending:
        token = np.asarray(token)
        yield token
        ended |= has_ended(token, eos)
        if ended.all():
            return


def has_ended(token: Any, eos: Any) -> Any:
    """[B] bool, the sequences whose newest token is an EOS or NO_TOKEN; arrays of numpy or jax."""
    return (token == NO_TOKEN) | is_eos(token, eos)


def is_eos(token: Any, eos: Any) -> Any:
    """[B] bool, which of the tokens [B] are among the ids [E] that end a sequence."""
    return (token[:, None] == eos[None]).any(axis=1)


@flax.struct.dataclass
class Sampling:
    """Sampling settings as arrays, so that new values compile nothing.

    Attributes:
        temperature: fp32 scalar; 0 is greedy.
        top_k: int32 scalar; sample among the k most likely tokens, 0 for all.
        top_p: fp32 scalar; sample among the most likely tokens that together reach this
            probability (nucleus sampling, arXiv 1904.09751), after top-k.
    """

    temperature: Any
    top_k: Any
    top_p: Any

    @classmethod
    def create(cls, temperature: float, top_k: int, top_p: float) -> Sampling:
        """Checks the settings and converts them to arrays.

        Raises:
            ValueError: a setting outside its range.
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
    """One token per sequence, int32. Each sequence has a key, so that rows are independent.

    The token is NO_TOKEN if a logit is not finite.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    token_B = jax.lax.cond(
        sampling.temperature > 0,
        lambda: jax.vmap(_sample_row, (0, 0, None))(logits_BV, keys_B, sampling),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )
    return jnp.where(finite_rows(logits_BV), token_B, jnp.int32(NO_TOKEN))


def _sample_row(logits_V: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    # Sort once; top-k is then a bound on the rank, and top-p on the probability before a token.
    order = jnp.argsort(logits_V, descending=True)
    ranked = logits_V[order] / jnp.maximum(sampling.temperature, 1e-6)
    rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
    ranked = jnp.where((sampling.top_k == 0) | (rank < sampling.top_k), ranked, -jnp.inf)
    probs = jax.nn.softmax(ranked)
    before = jnp.cumsum(probs) - probs  # probability of all more likely tokens; 0 for the first
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)
