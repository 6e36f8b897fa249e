"""Text generation: prompts in, new tokens out, in length buckets and chunks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import cache_bytes
from kvjax.cache.slots import whole_slots
from kvjax.context import Context, check_model, on_devices_of
from kvjax.decoding import (
    DecodeState,
    compress_again,
    decode,
    extend,
    first_token,
)
from kvjax.headkv.plan import FullPlan, Plan
from kvjax.headkv.policy import Full, Policy, resolve
from kvjax.headkv.scores import default_scores
from kvjax.headkv.split_plan import on_mesh
from kvjax.mesh import automatic_axes, mesh_of, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.numerics import not_finite
from kvjax.prefill_groups import prefill_in_groups
from kvjax.prompts import (
    batches,
    bucket_length,
    check_prompts,
    eos_array,
    pad,
    prompt_keys,
    prompt_words,
)
from kvjax.ranges import COUNT, Range, check_ranges, optional
from kvjax.sampling import NO_TOKEN, Sampling

STREAM_CHUNK = 32  # decode steps between two looks of the host
RANGES = {
    "max_new_tokens": COUNT,
    "seed": Range(least=-(2**63), most=2**63 - 1, whole=True),
    "batch_size": optional(COUNT),
    "prefill_size": optional(COUNT),
}

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


@automatic_axes()
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
    context: Context | None = None,
    prefill_size: int | None = None,
) -> Generation:
    """Continues every prompt.

    Prompts are grouped into length buckets (powers of two and the halves between); within a
    bucket nothing is compiled anew. Each prompt gets what it gets alone, whatever stands beside
    it: random numbers depend on the seed and the prompt (and on how often the same prompt came
    before it in the list).

    Args:
        prompts: token ids; lengths may differ.
        params: where they lie on a mesh (`kvjax.load(…, mesh=…)`), caches lie on it too.
        policy: what the cache keeps after prefill, e.g. "full", "snapkv:kv_size=128",
            "headkv:kv_size=128,beta=1.2,scores=heads.json". Without scores= a headkv policy uses
            head_scores.json of the model's directory.
        temperature: 0 for greedy.
        top_k, top_p: see `kvjax.sampling.Sampling`.
        eos_ids: ids that end a sequence; None for the model's own, () for none.
        batch_size: sequences at a time; None for a whole bucket.
        prefill_size: sequences that are read at a time, see `kvjax.prefill_groups`; None for all.
        on_tokens: called with (prompt index, new tokens) as chunks of tokens are ready.
        context: from `kvjax.compress`: every prompt goes on from it, and it stays as it is. What
            the prompts add is kept in full, so that neither `policy` nor `prefill_size` can be
            given with it.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a prompt that with
            max_new_tokens exceeds the context, a number out of its range, a policy that cannot be
            resolved, a context of another model or beside a policy, logits that are not finite.
    """
    numbers = {"max_new_tokens": max_new_tokens, "seed": seed}
    check_ranges(numbers | {"batch_size": batch_size, "prefill_size": prefill_size}, RANGES)
    max_new_tokens = operator.index(max_new_tokens)
    before = 0 if context is None else context.length
    check_prompts(model.config, prompts, max_new_tokens, before)
    sampling = Sampling.create(temperature, top_k, top_p)
    params = on_automatic_mesh(params)
    read = _reader(model, params, policy, context, max_new_tokens, prefill_size)
    mesh = mesh_of(params)
    eos = eos_array(model.config, eos_ids)
    key, words = jax.random.key(seed), prompt_words(prompts)
    result = Generation(tokens=[[] for _ in prompts])
    for indices in batches(prompts, batch_size):
        bucket = bucket_length(max(len(prompts[i]) for i in indices))
        tokens, lengths = pad([prompts[i] for i in indices], bucket)
        logits, cache, plan = read(tokens, lengths)
        result.cache_bytes += cache_bytes(cache)
        shape = (len(indices), bucket + before)
        result.full_cache_bytes += full_cache_bytes(model, params, shape, max_new_tokens)
        keys = prompt_keys(key, words[indices])
        state = first_token(logits, keys, sampling, eos, before + lengths, max_new_tokens, mesh)
        state = replace(state, cache=cache)
        for new in decode_chunks(model, params, state, sampling, eos, max_new_tokens, plan):
            for index, ids in zip(indices, new, strict=True):
                if NO_TOKEN in ids:
                    read_ids = [*prompts[index], *result.tokens[index]]
                    raise not_finite(f"the logits of prompt {index}", model, params, read_ids)
                result.tokens[index] += ids
                if on_tokens is not None and ids:
                    on_tokens(index, ids)
    return result


Reader = Callable[[np.ndarray, np.ndarray], tuple[jax.Array, Any, Plan]]
"""Padded prompts [B, T] and lengths [B] to the logits after them, caches with room, and the plan
that may compress these again."""


def _reader(
    model: Transformer,
    params: Any,
    policy: str | Policy,
    context: Context | None,
    max_new_tokens: int,
    prefill_size: int | None,
) -> Reader:
    """How prompts are read: from the start, or after a context."""
    if context is not None:
        asked = Policy.parse(policy) if isinstance(policy, str) else policy
        if asked != Full() or prefill_size is not None:
            raise ValueError(
                f"got policy {policy!r} and prefill_size {prefill_size} with a context, expected "
                "neither: a context is compressed already, and what prompts add stays"
            )
        check_model(context, model, params)
        held = on_devices_of(params, context.cache)

        def go_on(tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, Any, Plan]:
            logits, cache = extend(model, params, tokens, lengths, held, max_new_tokens)
            return logits, cache, FullPlan(model.config)

        return go_on
    resolved = resolve(policy, model.config, default_scores(model.config))

    def from_start(tokens: np.ndarray, lengths: np.ndarray) -> tuple[jax.Array, Any, Plan]:
        plan = make_plan(resolved, model, params, tokens.shape[1])
        settings = (plan, max_new_tokens, prefill_size)
        logits, cache = prefill_in_groups(model, params, tokens, lengths, *settings)
        return logits, cache, plan

    return from_start


def make_plan(policy: Policy, model: Transformer, params: Any, prompt_len: int) -> Plan:
    """What prefill does with the caches of these parameters, on their mesh if they lie on one."""
    plan = policy.plan(model.config, prompt_len, params["embedding"].dtype)
    return on_mesh(plan, mesh_of(params))


def decode_chunks(
    model: Transformer,
    params: Any,
    state: DecodeState,
    sampling: Sampling,
    eos: np.ndarray,
    max_new_tokens: int,
    plan: Plan,
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of each sequence, STREAM_CHUNK steps at a time, cut at its EOS.

    The newest token is not in the cache yet: after n tokens the cache holds n − 1 of them, and is
    compressed again whenever that is a multiple of `plan.every`.
    """
    done, alive = 0, np.ones(state.token.shape[0], bool)
    every = plan.every or max_new_tokens
    while done < max_new_tokens and alive.any():
        if done > 1 and (done - 1) % every == 0:
            state = compress_again(state, plan)
        stop = (max(done - 1, 0) // every + 1) * every + 1
        limit = min(done + STREAM_CHUNK, stop, max_new_tokens)
        state = decode(model, params, state, sampling, eos, jnp.asarray(limit, jnp.int32))
        chunk, now = np.asarray(state.output), int(state.step)
        yield [
            until_eos(row[done:now], eos) if lives else []
            for row, lives in zip(chunk, alive, strict=True)
        ]
        alive &= ~np.isin(chunk[:, done:now], eos).any(axis=1)
        done = now


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
    slots = whole_slots(length + max_new_tokens)
    make = functools.partial(model.init_cache, batch, slots, dtype)
    leaves = jax.tree.leaves(jax.eval_shape(make))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
