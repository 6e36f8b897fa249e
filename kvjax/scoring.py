"""Feeds right answers through compressed caches; several policies share one prefill of each prompt.

The right answer is fed to the model (teacher forcing). An answer counts as right if each of its
tokens, and the EOS after it, is the most likely one: greedy decoding would write this answer. If
the question is part of the prompt, prefill predicts the first token of the answer. As in decoding,
this happens before the cache is compressed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.checks import COUNT, check_ranges, token_ids
from kvjax.config import ModelConfig
from kvjax.decoding import NO_TOKEN, most_likely
from kvjax.example import Example
from kvjax.feeding import hidden_states, not_finite, output_weights
from kvjax.generation import Reader, from_start
from kvjax.mesh import on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.transformer import hidden_logits
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.prefill import shape_bytes

INSIDE, AFTER = "inside", "after"
PROTOCOLS = (INSIDE, AFTER)
"""Whether the question is part of the compressed prompt, or follows the compressed prompt."""

FULL = "full"
SLOTS = 16
"""Lengths are rounded up to a multiple of SLOTS, so that sets of examples share their programs."""


@dataclass(frozen=True)
class Compared:
    """The results of several policies on the same examples.

    Attributes:
        right: by policy, [items] whether the whole answer was right.
        cache_bytes: by policy, bytes after prefill of the longest prompt, without room for new
            tokens.
    """

    right: dict[str, Bool[np.ndarray, " items"]]
    cache_bytes: dict[str, int]


@dataclass(frozen=True)
class AnswerBatch:
    """Examples of one shape, right-padded.

    Attributes:
        context: [B, S] the tokens that prefill reads and the policy compresses.
        lengths: [B] tokens of each context.
        fed: [B, T] the tokens that follow: the answer, after the question if the question is not
            part of the context.
        positions: [B, T] positions of the fed tokens; −1 for padding.
        wanted: [B, 1 + T] the right token after the context and after each fed token; −1 where no
            token is asked for.
    """

    context: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, " B"]
    fed: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    wanted: Int[np.ndarray, "B T1"]


def compare(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    policies: Mapping[str, Compress],
    protocol: str = INSIDE,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Compared:
    """Judges every example under every policy, and with the full cache (the policy "full").

    Args:
        policies: by name, with their head scores; see `kvjax.policies.named.resolve`.
        protocol: "inside" or "after", see `PROTOCOLS`.
        batch_size: examples at a time.
        on_batch: called with the number of finished examples.

    Raises:
        ValueError: an unknown protocol; no examples; examples without the length of their
            question, or with tokens outside the vocabulary; a model without EOS; or logits that
            are not finite.
    """
    check_ranges({"batch_size": batch_size}, {"batch_size": COUNT})
    _check(model.config, examples, protocol)
    params, config = on_automatic_mesh(params), model.config
    every: dict[str, Policy] = {FULL: Full(), **policies}
    slots, fed_slots = _shape(examples, protocol)
    reader = from_start(model, params, list(every.values()))
    right = {name: np.zeros(len(examples), bool) for name in every}
    for start in range(0, len(examples), batch_size):
        # The last batch is filled up with copies of one example: one shape, one program.
        part = range(start, min(start + batch_size, len(examples)))
        padded = [examples[i] for i in part] + [examples[start]] * (batch_size - len(part))
        batch = make_batch(padded, protocol, config.eos_ids[0], slots, fed_slots)
        answers = answer_each(model, params, batch, reader)
        for name, found in zip(every, answers, strict=True):
            lost = ((found == NO_TOKEN) & (batch.wanted >= 0)).any(axis=1)
            if lost.any():
                row = int(np.argmax(lost))
                ids = [*padded[row].prompt, *padded[row].answer]
                what = f"the logits of example {start + row} under policy {name!r}"
                raise not_finite(what, model, params, ids)
            # An example is right where every token that is asked for is the most likely one.
            hits = ((found == batch.wanted) | (batch.wanted < 0)).all(axis=1)
            right[name][start : part.stop] = hits[: len(part)]
        if on_batch is not None:
            on_batch(part.stop)
    # Cache bytes follow from shapes alone.
    longest = max(_context_length(example, protocol) for example in examples)
    sizes = {}
    for name, policy in every.items():
        work = policy.compression(config, [longest], 0, params["embedding"].dtype)
        sizes[name] = shape_bytes(work, slots)
    return Compared(right, sizes)


def answer_each(
    model: Transformer, params: Any, batch: AnswerBatch, reader: Reader
) -> Iterator[Int[np.ndarray, "B T1"]]:
    """For each policy, the most likely token after the context and after each fed token."""
    top = output_weights(model, params)
    # The logits of prefill come before compression; all later ones see the compressed cache.
    for start in reader.read(batch.context, batch.lengths, batch.fed.shape[1]):
        first = np.asarray(most_likely(start.logits))[:, None]
        x, _ = hidden_states(model, params, batch.fed, batch.positions, start.cache)
        yield np.concatenate([first, np.asarray(_predictions(model.config, top, x))], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(config: ModelConfig, top: Any, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """The most likely token after each fed token, from the last layer's output."""
    return most_likely(hidden_logits(config, top, x))


def make_batch(
    examples: Sequence[Example], protocol: str, eos_id: int, slots: int, fed_slots: int
) -> AnswerBatch:
    """The arrays of a few examples.

    Args:
        eos_id: ends every answer.
        slots, fed_slots: S and T.
    """
    B = len(examples)
    context, lengths = np.zeros((B, slots), np.int32), np.zeros(B, np.int32)
    fed, positions = np.zeros((B, fed_slots), np.int32), np.full((B, fed_slots), -1, np.int32)
    wanted = np.full((B, fed_slots + 1), -1, np.int32)
    for row, example in enumerate(examples):
        n = _context_length(example, protocol)
        asked = len(example.prompt) - n
        rest = [*example.prompt[n:], *example.answer]
        # The question is fed with the answer unless the context holds it.
        context[row, :n], lengths[row] = example.prompt[:n], n
        fed[row, : len(rest)] = rest
        positions[row, : len(rest)] = n + np.arange(len(rest))
        wanted[row, asked : len(rest) + 1] = [*example.answer, eos_id]
    return AnswerBatch(context, lengths, fed, positions, wanted)


def _context_length(example: Example, protocol: str) -> int:
    """Tokens of the prompt that are compressed; the other tokens are fed with the answer."""
    asked = example.question_length if protocol == AFTER else 0
    return len(example.prompt) - asked


def _shape(examples: Sequence[Example], protocol: str) -> tuple[int, int]:
    """Slots of the context and of the fed tokens. All batches have the same."""
    contexts = [_context_length(example, protocol) for example in examples]
    whole = [len(example.prompt) + len(example.answer) for example in examples]
    fed = max(n - context for n, context in zip(whole, contexts, strict=True))
    return round_up(max(contexts)), round_up(fed)


def round_up(size: int) -> int:
    """Rounds a length up to a multiple of SLOTS."""
    return -(-size // SLOTS) * SLOTS


def _check(
    config: ModelConfig,
    examples: Sequence[Example],
    protocol: str,
) -> None:
    if not examples:
        raise ValueError("got no examples, expected at least one")
    if not config.eos_ids:
        raise ValueError("the model has no EOS id, expected one: an answer ends with it")
    for index, example in enumerate(examples):
        token_ids([*example.prompt, *example.answer], config.vocab_size, f"example {index}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    silent = [i for i, example in enumerate(examples) if not example.question_length]
    if protocol == AFTER and silent:
        raise ValueError(f"example {silent[0]} does not say how long its question is")
