"""Text generation: continues prompts in batches of similar length.

A `Reader` decides how a batch of prompts is read: from the start under several policies, or as the
continuation of a context.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from kvjax.cache import cache_bytes
from kvjax.cache.storage import room_bucket, whole_slots
from kvjax.checks import COUNT, Range, check_prompts, check_ranges, eos_array, optional
from kvjax.config import ModelConfig
from kvjax.context import Context, check_context, check_model, extend, on_devices_of
from kvjax.decoding import (
    Sampling,
    decode,
    first_token,
    is_eos,
    prompt_keys,
    prompt_words,
    step_function,
)
from kvjax.feeding import not_finite
from kvjax.mesh import automatic_axes, mesh_of, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import NO_TOKEN
from kvjax.policies.compression import Compression
from kvjax.policies.named import parse_policy, resolve_each
from kvjax.policies.policy import Full, Policy
from kvjax.prefilling import bucket_length, compressions, pad, prefill_in_groups, shape_bytes

RANGES = {
    "max_new_tokens": COUNT,
    "seed": Range(least=-(2**63), most=2**63 - 1, whole=True),
    "batch_size": optional(COUNT),
    "prefill_size": optional(COUNT),
}

OnTokens = Callable[[int, list[int]], bool | None]
"""Called with a prompt's index and its new tokens, as soon as they are ready; True ends the text of
this prompt."""

OnTokensOfEach = Callable[[int, int, list[int]], bool | None]
"""As `OnTokens`, with a policy's index first."""

OnResult = Callable[[int, "Generation"], None]
"""Called with a policy's index and its result, as soon as all prompts are continued under it."""


@dataclass
class Generation:
    """The result of `generate`.

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

    Prompts are grouped into length buckets (powers of two and the halves between). Within a bucket
    nothing is compiled again for other budgets or numbers of new tokens (up to 64, 128, 256, …). A
    prompt's result does not depend on the other prompts: random numbers depend on the seed and the
    prompt (and on how often the same prompt came before in the list).

    Args:
        prompts: token ids; lengths may differ.
        params: parameters; if they are on a mesh (`kvjax.load(…, mesh=…)`), the caches are too.
        policy: what the cache keeps after prefill, e.g. "full", "snapkv:kv_size=128",
            "headkv:kv_size=128,beta=1.2,scores=heads.json". Without scores= a headkv policy reads
            head_scores.json in the model's directory.
        temperature: 0 for greedy.
        top_k, top_p: see `kvjax.decoding.Sampling`.
        eos_ids: ids that end a sequence; None for the model's own, () for none.
        batch_size: sequences at a time; None for a whole bucket.
        prefill_size: sequences that are read at a time, see `kvjax.prefill`; None for all.
        on_tokens: called with (prompt index, new tokens) as tokens are ready, one by one. Where it
            returns True, the prompt gets no more tokens.
        context: from `kvjax.compress`. Every prompt continues the context, which stays unchanged.
            The tokens of the prompts are kept in full, so `policy` and `prefill_size` cannot be
            given together with a context.
        compile: what a step of decoding compiles: "block" (a program for each kind of layer, which
            its layers share) or "step" (one program, faster on accelerators, and many times slower
            to compile). None: "step" on accelerators for 256 tokens or more.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, a prompt that exceeds the
            model's context together with max_new_tokens, a number out of its range, a policy that
            cannot be resolved, parameters or a context of another model, a context together with a
            policy, logits that are not finite.
    """
    check_fits(model, params)
    if context is not None:
        check_context(context)
    before = 0 if context is None else context.length
    numbers = (max_new_tokens, seed, batch_size, before)
    settings = ((temperature, top_k, top_p), eos_ids, compile, prefill_size)
    asked = Request.create(model.config, prompts, *numbers, *settings)
    params = on_automatic_mesh(params)
    if context is None:
        reader = from_start(model, params, [policy], prefill_size)
    else:
        reader = after_context(model, params, context, policy, prefill_size)
    of_each = None if on_tokens is None else lambda _, index, new: on_tokens(index, new)
    (result,) = continue_prompts(model, params, asked, reader, of_each)
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
    on_tokens: OnTokensOfEach | None = None,
    on_result: OnResult | None = None,
    compile: str | None = None,
) -> list[Generation]:
    """Continues every prompt under each of several policies, and reads the prompts once for all.

    The caches of a batch exist at the same time until each has been decoded. If they are too large
    (see `together`), the batch is read again for each group of policies that fits.

    Args:
        policies: policies as in `generate`, which also explains all other arguments.
        on_tokens: called with (policy index, prompt index, new tokens); see `generate`.
        on_result: called with each policy's index and result, in order, when it is finished.

    Returns:
        The result of `generate` for each policy.

    Raises:
        ValueError: as `generate`.
    """
    check_fits(model, params)
    sampling = (temperature, top_k, top_p)
    numbers = (max_new_tokens, seed, batch_size, 0)
    asked = Request.create(model.config, prompts, *numbers, sampling, eos_ids, compile)
    params = on_automatic_mesh(params)
    reader = from_start(model, params, policies)
    return continue_prompts(model, params, asked, reader, on_tokens, on_result)


@dataclass(frozen=True)
class Request:
    """Checked prompts to continue and their settings; see `generate`.

    Attributes:
        eos: [E] int32, ids that end a sequence.
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
        """Checks the settings.

        Args:
            before: number of tokens that precede every prompt.
            sampling: arguments of `Sampling.create`.
        """
        numbers = {"max_new_tokens": max_new_tokens, "seed": seed}
        check_ranges(numbers | {"batch_size": batch_size, "prefill_size": prefill_size}, RANGES)
        new = operator.index(max_new_tokens)
        check_prompts(prompts, new, config.vocab_size, config.context_length, before)
        step_function(compile, new)
        rest = Sampling.create(*sampling), eos_array(eos_ids, config.eos_ids), compile
        return cls(prompts, new, seed, batch_size, *rest)


def continue_prompts(
    model: Transformer,
    params: Any,
    asked: Request,
    reader: Reader,
    on_tokens: OnTokensOfEach | None = None,
    on_result: OnResult | None = None,
) -> list[Generation]:
    """Loops over batches of prompts and, within a batch, over the reader's policies."""
    prompts, mesh = asked.prompts, mesh_of(params)
    key, words = jax.random.key(asked.seed), prompt_words(prompts)
    results = [Generation(tokens=[[] for _ in prompts]) for _ in range(reader.policies)]
    parts = batches(prompts, asked.batch_size)
    for indices in parts:
        # The prompts of a batch share one padded length, and batches of a bucket share programs.
        bucket = bucket_length(max(len(prompts[i]) for i in indices))
        tokens, lengths = pad([prompts[i] for i in indices], bucket)
        shape = (len(indices), bucket + reader.before)
        full = full_cache_bytes(model, params, shape, asked.max_new_tokens)
        keys = prompt_keys(key, words[indices])
        # Decode under one policy after the other.
        logits: Any = None
        for number, start in enumerate(reader.read(tokens, lengths, asked.max_new_tokens)):
            result = results[number]
            result.cache_bytes += cache_bytes(start.cache)
            result.full_cache_bytes += full
            # Policies that were read together have the same logits, and so the same first token.
            if start.logits is not logits:
                logits = start.logits
                first = first_token(logits, keys, asked.sampling, asked.eos, mesh)
            settings = asked.sampling, asked.eos, asked.max_new_tokens
            again = start.interval, start.again
            state = replace(first, cache=start.cache)
            steps = decode(model, params, state, *settings, *again, asked.compile)
            # Collect tokens until every row has ended; a token that stands for NaN is an error.
            alive = np.ones(len(indices), bool)
            for row, token in live_tokens(steps, asked.eos, alive):
                index = indices[row]
                if token == NO_TOKEN:
                    read_ids = [*prompts[index], *result.tokens[index]]
                    raise not_finite(f"the logits of prompt {index}", model, params, read_ids)
                result.tokens[index].append(token)
                if on_tokens is not None and on_tokens(number, index, [token]):
                    alive[row] = False
            if indices is parts[-1] and on_result is not None:
                on_result(number, result)
    return results


def batches(prompts: Sequence[Sequence[int]], batch_size: int | None) -> list[list[int]]:
    """Indices of prompts that share a bucket, at most `batch_size` in a batch."""
    by_bucket: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_bucket.setdefault(bucket_length(len(prompt)), []).append(index)
    return [
        indices[start : start + (batch_size or len(indices))]
        for _, indices in sorted(by_bucket.items())
        for start in range(0, len(indices), batch_size or len(indices))
    ]


def live_tokens(
    steps: Iterator[np.ndarray], eos: np.ndarray, alive: np.ndarray
) -> Iterator[tuple[int, int]]:
    """(row, token) for each row that has not ended, step by step, until all have.

    Args:
        alive: [B] bool, the rows that have not ended; the caller may end one.
    """
    for token in steps:
        alive &= ~is_eos(token, eos)
        for row in np.flatnonzero(alive):
            yield int(row), int(token[row])
        if not alive.any():
            return


def full_cache_bytes(
    model: Transformer, params: Any, shape: tuple[int, ...], max_new_tokens: int
) -> int:
    """Bytes of uncompressed caches for `shape` = (batch, prompt length) and the new tokens."""
    batch, length = shape
    dtype = params["embedding"].dtype
    slots = whole_slots(length + room_bucket(max_new_tokens))
    make = functools.partial(model.init_cache, batch, slots, dtype)
    leaves = jax.tree.leaves(jax.eval_shape(make))
    whole_lengths = 4 * batch  # `ModelCache.rope_lengths`, which these caches lack
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + whole_lengths


TOGETHER = 2**30
"""Bytes that the caches of several policies may have together, if the device does not report how
much memory it has."""
SHARE = 8
"""The caches of several policies together take at most 1 / SHARE of a device's memory."""


class Start(NamedTuple):
    """A batch of prompts under one policy, ready for decoding.

    Attributes:
        logits: [B, V] logits after each prompt.
        cache: the cache, with room for the new tokens.
        interval, again: see `kvjax.decoding.decode`.
    """

    logits: jax.Array
    cache: Any
    interval: int = 0
    again: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Reader:
    """Reads batches of prompts under one or several policies.

    Attributes:
        read: maps padded prompts [B, T], their lengths [B] and the number of new tokens to a
            `Start` for each policy, in order. Drop each before taking the next: it holds a cache.
        policies: number of policies.
        before: number of tokens that precede every prompt.
    """

    read: Callable[[np.ndarray, np.ndarray, int], Iterator[Start]]
    policies: int = 1
    before: int = 0


def from_start(
    model: Transformer,
    params: Any,
    policies: Sequence[str | Policy],
    prefill_size: int | None = None,
) -> Reader:
    """Reads each batch once for all policies whose caches fit in memory together, see `together`.

    Args:
        prefill_size: sequences that are read at a time, see `kvjax.prefill`.

    Raises:
        ValueError: a policy cannot be resolved.
    """
    resolved = resolve_each(policies, model.config)

    def read(tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int) -> Iterator[Start]:
        works = compressions(model, params, lengths, resolved, max_new_tokens)
        rest = iter(resolved)
        for group in together(works, tokens.shape[1]):
            logits, caches = prefill_in_groups(model, params, tokens, group, prefill_size)
            for work in group:
                # pop(), so that the caller can free each cache after decoding.
                interval = next(rest).compression_interval
                yield Start(logits, caches.pop(0), interval, work.again)

    return Reader(read, len(resolved))


def after_context(
    model: Transformer,
    params: Any,
    context: Context,
    policy: str | Policy,
    prefill_size: int | None = None,
) -> Reader:
    """Reads prompts as the continuation of a context, which stays unchanged.

    Raises:
        ValueError: a context of another model, or a policy or a prefill size is given.
    """
    asked = parse_policy(policy) if isinstance(policy, str) else policy
    if asked != Full() or prefill_size is not None:
        got = f"policy {policy!r}" if asked != Full() else f"prefill_size {prefill_size}"
        raise ValueError(
            f"got {got} with a context, expected none: a context is compressed already, and what "
            "prompts add stays"
        )
    check_model(context, model, params)
    held = on_devices_of(params, context.cache)

    def read(tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int) -> Iterator[Start]:
        yield Start(*extend(model, params, tokens, lengths, held, max_new_tokens))

    return Reader(read, before=context.length)


def together(works: Sequence[Compression], prompt_len: int) -> list[list[Compression]]:
    """Groups the policies, in order, so that the caches of a group fit in memory together.

    Args:
        prompt_len: tokens of the longest prompt.
    """
    if len(works) == 1:
        return [list(works)]
    groups: list[list[Compression]] = []
    held, most = 0, bytes_together()
    for work in works:
        size = shape_bytes(work, bucket_length(prompt_len))
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(work)
        held += size
    return groups


def bytes_together() -> int:
    """Bytes that the caches of several policies may have; equal on all devices of a kind."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return TOGETHER if memory is None else memory // SHARE
