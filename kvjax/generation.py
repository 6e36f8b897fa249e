"""Text generation: prompts in, new tokens out, in length buckets and chunks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from kvjax.cache import cache_bytes
from kvjax.cache.rows import room_bucket
from kvjax.cache.slots import whole_slots
from kvjax.checks import COUNT, Range, check_ranges, not_finite, optional
from kvjax.config import ModelConfig
from kvjax.context import Context
from kvjax.decoding import decode, first_token, step_function
from kvjax.headkv.policy import Policy
from kvjax.mesh import automatic_axes, mesh_of, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.prompts import (
    batches,
    bucket_length,
    check_prompts,
    eos_array,
    pad,
    prompt_keys,
    prompt_words,
)
from kvjax.reading import Reader, after_context, from_start
from kvjax.sampling import NO_TOKEN, Sampling

RANGES = {
    "max_new_tokens": COUNT,
    "seed": Range(least=-(2**63), most=2**63 - 1, whole=True),
    "batch_size": optional(COUNT),
    "prefill_size": optional(COUNT),
}

OnTokens = Callable[[int, list[int]], None]
"""Called with a prompt's index and its new tokens, as soon as there are any."""

OnResult = Callable[[int, "Generation"], None]
"""Called with a policy's index and its result, as soon as all prompts are continued under it."""


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
    compile: str | None = None,
) -> Generation:
    """Continues every prompt.

    Prompts are grouped into length buckets (powers of two and the halves between). Within a
    bucket nothing is compiled anew, whatever the budgets and the number of new tokens (up to 64,
    128, 256, …). Each prompt gets what it gets alone, whatever stands beside it: random numbers
    depend on the seed and the prompt (and on how often the same prompt came before it in the list).

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
        on_tokens: called with (prompt index, new tokens) as tokens are ready, one by one.
        context: from `kvjax.compress`: every prompt goes on from it, and it stays as it is. What
            the prompts add is kept in full, so that neither `policy` nor `prefill_size` can be
            given with it.
        compile: what a step of decoding compiles, "block" (a program for each kind of layer, which
            its layers share) or "step" (one program, faster on accelerators, and many times slower
            to compile). None: "step" on accelerators for 256 tokens or more.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a prompt that with
            max_new_tokens exceeds the context, a number out of its range, a policy that cannot be
            resolved, a context of another model or beside a policy, logits that are not finite.
    """
    before = 0 if context is None else context.length
    numbers = (max_new_tokens, seed, batch_size, before)
    settings = ((temperature, top_k, top_p), eos_ids, compile, prefill_size)
    asked = Request.create(model.config, prompts, *numbers, *settings)
    params = on_automatic_mesh(params)
    if context is None:
        reader = from_start(model, params, [policy], prefill_size)
    else:
        reader = after_context(model, params, context, policy, prefill_size)
    (result,) = continue_prompts(model, params, asked, reader, on_tokens)
    return result


@automatic_axes()
def generate_each(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[str | Policy],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    on_result: OnResult | None = None,
    compile: str | None = None,
) -> list[Generation]:
    """Continues every prompt under each of several policies, and reads it once for all of them.

    A batch's caches exist beside each other until each has been decoded. Where they are too large
    for that (see `kvjax.reading.together`) the batch is read once for a part of the policies.

    Args:
        policies: see `generate`, as for all other arguments.
        on_result: called with a policy's index and its result, in order, as they are finished.

    Returns:
        What `generate` returns for each policy.

    Raises:
        ValueError: as `generate`.
    """
    sampling = (temperature, top_k, top_p)
    numbers = (max_new_tokens, seed, batch_size, 0)
    asked = Request.create(model.config, prompts, *numbers, sampling, eos_ids, compile)
    params = on_automatic_mesh(params)
    reader = from_start(model, params, policies)
    return continue_prompts(model, params, asked, reader, on_result=on_result)


@dataclass(frozen=True)
class Request:
    """Prompts to continue, and how; see `generate`.

    Attributes:
        eos: [E] int32.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    seed: int
    batch_size: int | None
    sampling: Sampling
    eos: np.ndarray
    compile: str | None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        prompts: Any,
        max_new_tokens: Any,
        seed: Any,
        batch_size: Any,
        before: int,
        sampling: Any,
        eos_ids: Any,
        compile: str | None,
        prefill_size: Any = None,
    ) -> Request:
        """Checked settings.

        Args:
            before: tokens that precede every prompt.
            sampling: the arguments of `Sampling.create`.
        """
        numbers = {"max_new_tokens": max_new_tokens, "seed": seed}
        check_ranges(numbers | {"batch_size": batch_size, "prefill_size": prefill_size}, RANGES)
        new = operator.index(max_new_tokens)
        check_prompts(config, prompts, new, before)
        step_function(compile, new)
        rest = Sampling.create(*sampling), eos_array(config, eos_ids), compile
        return cls(prompts, new, seed, batch_size, *rest)


def continue_prompts(
    model: Transformer,
    params: Any,
    asked: Request,
    reader: Reader,
    on_tokens: OnTokens | None = None,
    on_result: OnResult | None = None,
) -> list[Generation]:
    """The loop over batches of prompts and, within one, over the policies of the reader."""
    prompts, mesh = asked.prompts, mesh_of(params)
    key, words = jax.random.key(asked.seed), prompt_words(prompts)
    results = [Generation(tokens=[[] for _ in prompts]) for _ in range(reader.policies)]
    parts = batches(prompts, asked.batch_size)
    for indices in parts:
        bucket = bucket_length(max(len(prompts[i]) for i in indices))
        tokens, lengths = pad([prompts[i] for i in indices], bucket)
        shape = (len(indices), bucket + reader.before)
        full = full_cache_bytes(model, params, shape, asked.max_new_tokens)
        keys = prompt_keys(key, words[indices])
        for number, start in enumerate(reader.read(tokens, lengths, asked.max_new_tokens)):
            result = results[number]
            result.cache_bytes += cache_bytes(start.cache)
            result.full_cache_bytes += full
            state = first_token(start.logits, keys, asked.sampling, asked.eos, mesh)
            settings = asked.sampling, asked.eos, asked.max_new_tokens
            again = start.every, start.again
            state = replace(state, cache=start.cache)
            steps = decode(model, params, state, *settings, *again, asked.compile)
            for row, token in live_tokens(steps, asked.eos, len(indices)):
                index = indices[row]
                if token == NO_TOKEN:
                    read_ids = [*prompts[index], *result.tokens[index]]
                    raise not_finite(f"the logits of prompt {index}", model, params, read_ids)
                result.tokens[index].append(token)
                if on_tokens is not None:
                    on_tokens(index, [token])
            if indices is parts[-1] and on_result is not None:
                on_result(number, result)
    return results


def live_tokens(
    steps: Iterator[np.ndarray], eos: np.ndarray, batch: int
) -> Iterator[tuple[int, int]]:
    """(row, token) for each row that has not ended, step by step."""
    alive = np.ones(batch, bool)
    for token in steps:
        alive &= ~np.isin(token, eos)
        for row in np.flatnonzero(alive):
            yield int(row), int(token[row])


def full_cache_bytes(
    model: Transformer, params: Any, shape: tuple[int, ...], max_new_tokens: int
) -> int:
    """Bytes of uncompressed caches for `shape` = (batch, prompt length) and the new tokens."""
    batch, length = shape
    dtype = params["embedding"].dtype
    slots = whole_slots(length + room_bucket(max_new_tokens))
    make = functools.partial(model.init_cache, batch, slots, dtype)
    leaves = jax.tree.leaves(jax.eval_shape(make))
    whole_lengths = 4 * batch
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + whole_lengths
