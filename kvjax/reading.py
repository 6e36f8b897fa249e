"""How a batch of prompts is read: from the start under several policies, or after a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from kvjax.context import Context, check_model, extend, on_devices_of
from kvjax.nn import Transformer
from kvjax.policies.compression import Compression
from kvjax.policies.named import parse_policy, resolve_each
from kvjax.policies.policy import Full, Policy
from kvjax.prefill import compressions, shape_bytes
from kvjax.prefill_groups import prefill_in_groups
from kvjax.prompts import bucket_length

TOGETHER = 2**30
"""Bytes of caches of several policies that exist at a time, where the device does not say how much
memory it has."""
SHARE = 8
"""Of a device's memory no more than one part in `SHARE` holds the caches of several policies."""


class Start(NamedTuple):
    """A batch of prompts under one policy, ready for decoding.

    Attributes:
        logits: [B, V] after each prompt.
        cache: with room for the new tokens.
        every, again: see `kvjax.decoding.decode`.
    """

    logits: jax.Array
    cache: Any
    every: int = 0
    again: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Reader:
    """Reads batches of prompts for a number of policies.

    Attributes:
        read: padded prompts [B, T], their lengths [B] and the number of new tokens, to a `Start`
            for each policy, in order. Take one after the other: they hold the caches.
        policies: how many.
        before: tokens that precede every prompt.
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
    """Reads each batch once for all policies whose caches fit beside each other, see `together`.

    Args:
        prefill_size: sequences that are read at a time, see `kvjax.prefill_groups`.

    Raises:
        ValueError: a policy that cannot be resolved.
    """
    resolved = resolve_each(policies, model.config)

    def read(tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int) -> Iterator[Start]:
        works = compressions(model, params, lengths, resolved, max_new_tokens)
        rest = iter(resolved)
        for group in together(works, tokens.shape[1]):
            logits, caches = prefill_in_groups(model, params, tokens, group, prefill_size)
            for work in group:
                yield Start(logits, caches.pop(0), next(rest).every, work.again)

    return Reader(read, len(resolved))


def after_context(
    model: Transformer,
    params: Any,
    context: Context,
    policy: str | Policy,
    prefill_size: int | None = None,
) -> Reader:
    """Reads prompts as what follows the context, which stays as it is.

    Raises:
        ValueError: a context of another model; a policy or a prefill size.
    """
    asked = parse_policy(policy) if isinstance(policy, str) else policy
    if asked != Full() or prefill_size is not None:
        raise ValueError(
            f"got policy {policy!r} and prefill_size {prefill_size} with a context, expected "
            "neither: a context is compressed already, and what prompts add stays"
        )
    check_model(context, model, params)
    held = on_devices_of(params, context.cache)

    def read(tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int) -> Iterator[Start]:
        yield Start(*extend(model, params, tokens, lengths, held, max_new_tokens))

    return Reader(read, before=context.length)


def together(works: Sequence[Compression], prompt_len: int) -> list[list[Compression]]:
    """The policies in groups, in order, whose caches may exist at the same time.

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
    """Bytes that the caches of several policies may hold; the same on all devices of a kind."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return TOGETHER if memory is None else memory // SHARE
