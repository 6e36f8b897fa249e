"""Known text, fed to the model and judged: dense, or from a compressed cache.

Perplexity needs losses of a text's tokens, lm-evaluation-harness log-likelihoods of continuations.
Protocols "teacher" and "after" of `eval.run` ask whether a right answer is the most likely one. The
first judged token is predicted in two ways:

- In `losses_after_prefix` and protocol "teacher" by the prefill, before anything is dropped. It is
  then the same for every policy, like the first token of a decoded answer.
- In `score_compressed` and protocol "after" by the compressed cache, like all others: the context's
  last token, or the question, is fed after the compression.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from eval.prompts import Prompt, Shape
from eval.task import Item, Task
from kvjax.cache import cache_bytes
from kvjax.config import ModelConfig
from kvjax.decoding import most_likely
from kvjax.example import Example
from kvjax.feeding import hidden_states, not_finite, output_weights
from kvjax.generation import Start, from_start, full_cache_bytes
from kvjax.nn import Transformer
from kvjax.nn.transformer import hidden_logits
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.prefill import bucket_length, pad, prefill
from kvjax.scoring import AFTER, FULL, INSIDE, Compared, compare, round_up
from kvjax.tasks.scoring import check_losses, chunk_losses
from kvjax.text import ids_after

PIECE = 128  # tokens of a text that are fed at a time
SHORT_PIECE = 64  # the same for continuations, most of which are short
METRIC = "teacher_forced_exact_match"


def dense_losses(
    model: Transformer, params: Any, rows: Int[np.ndarray, "C T"], stride: int, batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Losses in nats without a cache, for each batch one array a row.

    Every token but a row's first has a loss.

    Args:
        stride: tokens from the start of a row to the start of the next one. Where rows overlap,
            the tokens that an earlier row has scored are left out.
    """
    length = rows.shape[1]
    for start, batch in _row_batches(rows, batch_size):
        losses = np.asarray(chunk_losses(model, params, jnp.asarray(batch)))
        check_losses(losses, model, params, batch)
        fresh = [row[-stride:] if stride < length else row for row in losses]
        # The first row has no earlier row, so all its losses are new.
        if start == 0:
            fresh[0] = losses[0]
        yield fresh[: len(rows) - start]


def losses_after_prefix(
    model: Transformer,
    params: Any,
    rows: Int[np.ndarray, "C T"],
    prefix: int,
    policies: Sequence[Policy],
    batch_size: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Losses in nats of the tokens after the first `prefix`, which are read and then compressed.

    Returns:
        For each batch, and within one for each policy, the policy's index and an array a row.

    Raises:
        ValueError: a prefix that leaves nothing to score, or a policy that bounds the growth: its
            cache would change while a piece of the continuation is read.
    """
    if not 1 <= prefix < rows.shape[1]:
        raise ValueError(f"prefix is {prefix}, expected 1 to {rows.shape[1] - 1}")
    if any(map(bounds_growth, policies)):
        raise ValueError("perplexity after a prefix does not fit policies with ring or every")
    reader = from_start(model, params, policies)
    lengths = np.full(min(batch_size, len(rows)), prefix, np.int32)
    for first, batch in _row_batches(rows, batch_size):
        starts = reader.read(batch[:, :prefix], lengths, batch.shape[1] - prefix)
        for number, start in enumerate(starts):
            losses = _rest_losses(model, params, batch, prefix, start)
            yield number, list(losses)[: len(rows) - first]


def _rest_losses(
    model: Transformer, params: Any, tokens: Int[np.ndarray, "B T"], prefix: int, start: Start
) -> Float[np.ndarray, "B C"]:
    """Losses of the tokens from `prefix` on. The cache of `start` is used up."""
    rest, top = tokens[:, prefix:], output_weights(model, params)
    # The prefill's logits predict the first token after the prefix.
    found = [_token_losses(start.logits[:, None], rest[:, :1])]
    lengths = np.full(len(tokens), prefix)
    for x, wanted in _feed(model, params, start.cache, rest, lengths, PIECE):
        found.append(_hidden_losses(model.config, top, x, wanted))
    losses = np.concatenate([np.asarray(part) for part in found], axis=1)[:, : rest.shape[1]]
    check_losses(losses, model, params, tokens)
    return losses


def _row_batches(
    rows: Int[np.ndarray, "C T"], batch_size: int
) -> Iterator[tuple[int, Int[np.ndarray, "B T"]]]:
    """Batches of one size; the last one is filled with its last row."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected ≥ 1")
    size = min(batch_size, len(rows))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        # A smaller last batch would compile the program a second time.
        fill = np.repeat(batch[-1:], size - len(batch), axis=0)
        yield start, np.concatenate([batch, fill])


@dataclass(frozen=True)
class LogLikelihoods:
    """Log-likelihoods of a batch of continuations.

    Attributes:
        log_likelihood: [B] nats, the sum over a continuation's tokens.
        greedy: [B] every token is the most likely one.
        cache_bytes, full_cache_bytes: of the whole batch, with room for the continuations; without
            a cache, what an uncompressed one would hold.
    """

    log_likelihood: Float[np.ndarray, " B"]
    greedy: Bool[np.ndarray, " B"]
    cache_bytes: int
    full_cache_bytes: int


def score_compressed(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    policy: Policy,
) -> LogLikelihoods:
    """Log-likelihoods of continuations of different lengths after contexts that are compressed.

    The last token of each context is fed after the compression, so every token of a continuation
    is predicted from the compressed cache. After a prefill of the whole context, the first of them,
    for many tasks the only one, would be the uncompressed model's. Contexts of a single token,
    which leave nothing to compress, are read whole. Both texts have at least one token.
    """
    reads = [list(context[:-1] or context) for context in contexts]
    rests = [[*a[len(r) :], *b] for a, b, r in zip(contexts, continuations, reads, strict=True)]
    # A context of one token stays whole, so the prefill predicts the first token after it.
    alone = np.asarray([len(context) == 1 for context in contexts])
    longest = max(map(len, rests))
    room = -(-longest // SHORT_PIECE) * SHORT_PIECE
    bucket = min(bucket_length(max(map(len, reads))), model.config.context_length)
    # The prefill stores the contexts; only contexts of one token use its logits.
    tokens, lengths = pad(reads, bucket)
    logits, cache = prefill(model, params, tokens, lengths, policy, max_new_tokens=room)
    held = cache_bytes(cache)
    # Then the rests go through the compressed cache.
    fed = np.full((len(reads), longest), -1, np.int32)
    for row, ids in zip(fed, rests, strict=True):
        row[: len(ids)] = ids
    first = np.where(alone[:, None], fed[:, :1], -1).astype(np.int32)
    total, greedy = _sums(logits[:, None], first)
    top = output_weights(model, params)
    for x, wanted in _feed(model, params, cache, fed, lengths, SHORT_PIECE):
        more, right = _hidden_sums(model.config, top, x, wanted)
        total, greedy = total + more, greedy & right
    full = full_cache_bytes(model, params, (len(reads), bucket), room)
    sums = _checked(np.asarray(total), model, params, contexts, continuations)
    return LogLikelihoods(sums, np.asarray(greedy), held, full)


def score_dense(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> LogLikelihoods:
    """As `score_compressed`, in one forward pass without a cache."""
    rows = [[*a, *b] for a, b in zip(contexts, continuations, strict=True)]
    # One more slot than the context: the last token is only predicted.
    bucket = min(bucket_length(max(map(len, rows))), model.config.context_length + 1)
    tokens = np.zeros((len(rows), bucket), np.int32)
    wanted = np.full((len(rows), bucket - 1), -1, np.int32)
    for row, (ids, context) in enumerate(zip(rows, contexts, strict=True)):
        tokens[row, : len(ids)] = ids
        # The output at position i predicts token i + 1.
        wanted[row, len(context) - 1 : len(ids) - 1] = ids[len(context) :]
    x, _ = hidden_states(model, params, tokens[:, :-1])
    total, greedy = _hidden_sums(model.config, output_weights(model, params), x, wanted)
    full = full_cache_bytes(model, params, (len(rows), bucket), 0)
    sums = _checked(np.asarray(total), model, params, contexts, continuations)
    return LogLikelihoods(sums, np.asarray(greedy), full, full)


def check_feedable(policy: Policy) -> None:
    """Raises ValueError for policies whose cache changes while a continuation is fed."""
    if bounds_growth(policy):
        raise ValueError("log-likelihoods do not fit policies with ring or every")


def bounds_growth(policy: Policy) -> bool:
    """Whether entries leave the policy's cache while tokens come in.

    Text that is fed in pieces does not show what such a policy does.
    """
    return bool(getattr(policy, "ring", 0) or getattr(policy, "every", 0))


def _checked(
    sums: Float[np.ndarray, " B"],
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> Float[np.ndarray, " B"]:
    """The log-likelihoods; raises ValueError for those that are not finite."""
    bad = ~np.isfinite(sums)
    if bad.any():
        row = int(np.argmax(bad))
        ids = [*contexts[row], *continuations[row]]
        raise not_finite("the log-likelihoods", model, params, ids)
    return sums


def _feed(
    model: Transformer,
    params: Any,
    cache: Any,
    ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    piece: int,
) -> Iterator[tuple[Float[Array, "B P D"], Int[np.ndarray, "B P"]]]:
    """Feeds ids into a cache, `piece` at a time.

    Args:
        cache: with room for the ids; used up.
        ids: −1 marks padding on the right. A row's last token is not fed: nothing follows it.
        lengths: [B] tokens that precede the ids.

    Returns:
        For each piece the last layer's output, and the token that follows each fed one, −1 where
        none does.
    """
    longest = ids.shape[1]
    # All pieces have one shape, so one program serves them all.
    padded = np.pad(ids, ((0, 0), (0, piece)), constant_values=-1).astype(np.int32)
    for start in range(0, longest - 1, piece):
        fed, wanted = (padded[:, at : at + piece] for at in (start, start + 1))
        # Position −1 keeps a token out of the cache: padding, and each row's last token.
        positions = np.asarray(lengths)[:, None] + np.arange(start, start + piece)
        positions = np.where(wanted >= 0, positions, -1).astype(np.int32)
        x, cache = hidden_states(model, params, np.maximum(fed, 0), positions, cache)
        yield x, wanted


@functools.partial(jax.jit, static_argnums=0)
def _hidden_losses(
    config: ModelConfig, top: Any, x: Float[Array, "B P D"], wanted: Int[Array, "B P"]
) -> Float[Array, "B P"]:
    """`_token_losses` of the last layer's output."""
    return _token_losses(hidden_logits(config, top, x), wanted)


@jax.jit
def _token_losses(logits: Float[Array, "B P V"], wanted: Int[Array, "B P"]) -> Float[Array, "B P"]:
    """Cross-entropies in nats; of no meaning where `wanted` is −1."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted, 0))


@functools.partial(jax.jit, static_argnums=0)
def _hidden_sums(
    config: ModelConfig, top: Any, x: Float[Array, "B P D"], wanted: Int[Array, "B P"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`_sums` of the last layer's output."""
    return _sums(hidden_logits(config, top, x), wanted)


@jax.jit
def _sums(
    logits: Float[Array, "B P V"], wanted: Int[Array, "B P"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sum of log-probabilities where something is wanted, and whether all of it is the argmax."""
    asked = wanted >= 0
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
    right = (most_likely(logits) == wanted) | ~asked
    return jnp.where(asked, chosen, 0.0).sum(axis=-1), right.all(axis=-1)


@dataclass(frozen=True)
class TeacherForced:
    """Right answers, to be fed through the caches of all policies after one prefill.

    Attributes:
        examples: one for each prompt, in order.
        policies: those that compress; the full cache is always compared too.
        protocol: of `kvjax.pipelines.compare`: whether the question is inside the compressed
            prompt, or is asked after its compression.
    """

    examples: tuple[Example, ...]
    policies: Mapping[str, Compress]
    protocol: str

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Any,
        task: Task,
        prompts: Sequence[Prompt],
        policies: Mapping[str, Policy],
        protocol: str,
    ) -> TeacherForced:
        """The prompts of a task with their answers.

        An item's meta may hold the answer's ids ("answer") and the number of tokens at the prompt's
        end that ask ("question_tokens").

        Raises:
            ValueError: an item without exactly one right answer, a model without an EOS, policies
                that cannot be compared.
        """
        compressing = comparable(policies)
        if not model.config.eos_ids:
            raise ValueError("the model has no EOS id: no telling where an answer ends")
        examples = tuple(_example(tokenizer, task, prompt) for prompt in prompts)
        return cls(examples, compressing, AFTER if protocol == "after" else INSIDE)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Indices of examples that share the shapes of context and answer, the largest first."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, example in enumerate(self.examples):
            asked = self._asked(example)
            key = round_up(len(example.prompt) - asked), round_up(len(example.answer) + asked)
            groups.setdefault(key, []).append(index)
        return [
            # Largest shapes first: a lack of memory shows at the start.
            members[start : start + batch_size]
            for _, members in sorted(groups.items(), reverse=True)
            for start in range(0, len(members), batch_size)
        ]

    def judge(
        self, model: Transformer, params: Any, part: Sequence[int], batch_size: int
    ) -> Compared:
        """Which of these examples each policy answers, and the bytes of its cache."""
        chosen = [self.examples[index] for index in part]
        return compare(model, params, chosen, self.policies, self.protocol, batch_size)

    def name_of(self, policy: str) -> str:
        """The policy's name in what `judge` returns."""
        return policy if policy in self.policies else FULL

    def shapes(self) -> dict[Shape, int]:
        """How many prompts are compressed in each shape, without room for an answer."""
        lengths = [len(example.prompt) - self._asked(example) for example in self.examples]
        return dict(Counter(Shape(round_up(length), 0, 1) for length in lengths))

    def _asked(self, example: Example) -> int:
        """Tokens of the prompt that are fed after the compression."""
        return example.question_length if self.protocol == AFTER else 0


def comparable(policies: Mapping[str, Policy]) -> dict[str, Compress]:
    """The policies that compress.

    Raises:
        ValueError: "full" with 8-bit entries, or a policy that bounds the growth: feeding an answer
            in one piece does not show the effect of such a policy.
    """
    compressing = {}
    for name, policy in policies.items():
        if isinstance(policy, Compress) and not bounds_growth(policy):
            compressing[name] = policy
        elif policy != Full():
            raise ValueError(f"policy {name!r} cannot be teacher-forced: use protocol 'generate'")
    return compressing


def _example(tokenizer: Any, task: Task, prompt: Prompt) -> Example:
    item = task.items[prompt.index]
    ids = item.meta.get("answer") or _answer_ids(tokenizer, item)
    return Example(
        prompt=prompt.ids,
        answer=tuple(ids),
        question_length=item.meta.get("question_tokens", 0),
    )


def _answer_ids(tokenizer: Any, item: Item) -> list[int]:
    if len(item.references) != 1:
        raise ValueError(
            f"item {item.id} has {len(item.references)} right answers, expected one: "
            "use protocol 'generate'"
        )
    return ids_after(tokenizer, f" {item.references[0]}")
