"""Text generation: bucketed prefill, then decode as one jitted while_loop on a donated cache."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kvjax.cache import cache_bytes
from kvjax.config import ModelConfig
from kvjax.headkv.policy import Plan, Policy, resolve
from kvjax.headkv.scores import HeadScores, load_scores
from kvjax.nn import Transformer
from kvjax.sampling import Sampling, sample

STREAM_CHUNK = 32  # decode steps between two looks of the host
SMALLEST_BUCKET = 32

OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens, a chunk at a time."""


@dataclass
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: the new tokens of each prompt, without the EOS that ended it.
        cache_bytes: bytes of all cache arrays after prefill, room for the new tokens included.
        full_cache_bytes: the same for this model's uncompressed caches.
    """

    tokens: list[list[int]] = field(default_factory=list)
    cache_bytes: int = 0
    full_cache_bytes: int = 0


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


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    policy: str | Policy = "full",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues every prompt.

    Prompts are grouped into length buckets (powers of two and the halves between); within a
    bucket nothing is compiled anew. Each prompt gets what it gets alone, whatever stands beside
    it: random numbers depend on the seed and the prompt (and on how often the same prompt came
    before it in the list).

    Args:
        prompts: token ids; lengths may differ.
        policy: what the cache keeps after prefill, e.g. "full", "snapkv:kv_size=128",
            "headkv:kv_size=128,beta=1.2,scores=heads.json". Without scores= a headkv policy uses
            head_scores.json of the model's directory.
        temperature: 0 for greedy.
        top_k, top_p: see `kvjax.sampling.Sampling`.
        eos_ids: ids that end a sequence; None for the model's own, () for none.
        batch_size: sequences at a time; None for a whole bucket.
        on_tokens: called with (prompt index, new tokens) as chunks of tokens are ready.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a prompt that with
            max_new_tokens exceeds the context, a sampling setting out of range, a policy that
            cannot be resolved.
    """
    check_prompts(model.config, prompts, max_new_tokens)
    sampling = Sampling.create(temperature, top_k, top_p)
    resolved = resolve(policy, model.config, default_scores(model.config))
    eos = np.asarray(model.config.eos_ids if eos_ids is None else eos_ids, np.int32)
    keys = prompt_keys(prompts, seed)
    result = Generation(tokens=[[] for _ in prompts])
    for indices in batches(prompts, batch_size):
        bucket = bucket_length(max(len(prompts[i]) for i in indices))
        plan = resolved.plan(model.config, bucket)
        tokens, lengths = pad([prompts[i] for i in indices], bucket)
        logits, cache = prefill(model, params, tokens, lengths, plan, max_new_tokens=max_new_tokens)
        result.cache_bytes += cache_bytes(cache)
        result.full_cache_bytes += full_cache_bytes(model, params, tokens.shape, max_new_tokens)
        state = first_token(
            logits, cache, keys[np.asarray(indices)], sampling, eos, lengths, max_new_tokens
        )
        for new in decode_chunks(model, params, state, sampling, eos, max_new_tokens):
            for index, ids in zip(indices, new, strict=True):
                result.tokens[index] += ids
                if on_tokens is not None and ids:
                    on_tokens(index, ids)
    return result


def decode_chunks(model, params, state: DecodeState, sampling, eos, max_new_tokens: int):
    """Yields the new tokens of each sequence, STREAM_CHUNK steps at a time, cut at its EOS."""
    done, alive = 0, np.ones(state.token.shape[0], bool)
    while done < max_new_tokens and alive.any():
        limit = min(done + STREAM_CHUNK, max_new_tokens)
        state = decode(model, params, state, sampling, eos, jnp.asarray(limit, jnp.int32))
        chunk, now = np.asarray(state.output), int(state.step)
        yield [
            until_eos(row[done:now], eos) if lives else []
            for row, lives in zip(chunk, alive, strict=True)
        ]
        alive &= ~np.isin(chunk[:, done:now], eos).any(axis=1)
        done = now


# --- The two jitted programs -------------------------------------------------------------------


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


# --- Host side ---------------------------------------------------------------------------------


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises ValueError for prompts that this model cannot continue."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected ≥ 1")
    if not len(prompts):
        raise ValueError("got no prompts, expected at least one")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        if len(prompt) + max_new_tokens > config.context_length:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, "
                f"expected at most {config.context_length} in all: the model's context"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {index} has token {low if low < 0 else high}, "
                f"expected ids of 0 to {config.vocab_size - 1}"
            )


def default_scores(config: ModelConfig) -> HeadScores | None:
    """Head scores that lie beside the model's weights, if any."""
    path = Path(config.source) / "head_scores.json"
    return load_scores(path, config) if config.source and path.is_file() else None


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, … that holds `length` tokens."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def batches(prompts: Sequence[Sequence[int]], batch_size: int | None) -> list[list[int]]:
    """Indices of prompts that share a bucket, at most `batch_size` together."""
    by_bucket: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_bucket.setdefault(bucket_length(len(prompt)), []).append(index)
    return [
        indices[start : start + (batch_size or len(indices))]
        for _, indices in sorted(by_bucket.items())
        for start in range(0, len(indices), batch_size or len(indices))
    ]


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] and the lengths [B], int32."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def prompt_keys(prompts: Sequence[Sequence[int]], seed: int) -> jax.Array:
    """[B] keys that depend on the seed, the prompt and how often it came before."""
    seen: Counter[int] = Counter()
    words = []
    for prompt in prompts:
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        words.append((checksum, seen[checksum]))
        seen[checksum] += 1
    return _fold_words(jax.random.key(seed), np.asarray(words, np.uint32))


@jax.jit
def _fold_words(key: jax.Array, words: jax.Array) -> jax.Array:
    def fold(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1])

    return jax.vmap(fold)(words)


def until_eos(ids: np.ndarray, eos: np.ndarray) -> list[int]:
    """The ids before the first EOS."""
    ends = np.flatnonzero(np.isin(ids, eos))
    return ids[: ends[0] if len(ends) else len(ids)].tolist()


def full_cache_bytes(
    model: Transformer, params: Any, shape: tuple[int, ...], max_new_tokens: int
) -> int:
    """Bytes of uncompressed caches for `shape` = (batch, prompt length) and the new tokens."""
    batch, length = shape
    dtype = params["embedding"].dtype
    make = functools.partial(model.init_cache, batch, length + max_new_tokens, dtype)
    leaves = jax.tree.leaves(jax.eval_shape(make))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
