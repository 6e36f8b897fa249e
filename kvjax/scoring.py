"""Judges known texts: how likely the model finds their tokens, dense or from a compressed cache.

A `Text` says which of its tokens the prefill reads and a policy compresses, and which are judged.
The others are fed (teacher forcing). `judge_dense` feeds whole texts without a cache. With
`judge_compressed` several policies share one prefill. Accuracies, perplexities, log-likelihoods and
the comparison of policies are made of the tokens that these two have judged.

Every judged token sees the compressed cache, the first one too. The prefill itself would predict
the first token before anything is dropped, for every policy alike. So where the whole context was
read, its last token is fed again to the compressed cache, in its own place (see
`kvjax.cache.without_last`). Budgets, bytes and the observed queries are those of the whole context,
as in generation. Compressing the context without its last token would hide from the policy the
query that asks for the first judged token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import cache_bytes, without_last
from kvjax.checks import COUNT, check_ranges, token_ids
from kvjax.config import ModelConfig
from kvjax.example import Example
from kvjax.feeding import hidden_states, judge, not_finite
from kvjax.generation import Reader, from_start
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import NO_TOKEN
from kvjax.policies.named import resolve_each
from kvjax.policies.policy import Full, Policy, check_growth
from kvjax.prefilling import bucket_length, pad, prompt_bytes

PIECE = 128
"""Tokens of a text that are fed to a compressed cache at a time, at most."""
INSIDE, AFTER = "inside", "after"
PROTOCOLS = (INSIDE, AFTER)
"""Whether the question is part of the compressed prompt, or follows the compressed prompt."""
FULL = "full"


class Text(NamedTuple):
    """A known text whose tokens from `first` on are judged.

    Attributes:
        ids: token ids.
        first: index of the first judged token, at least 1.
        read: number of tokens that prefill reads and a policy compresses, at most `first`. The
            tokens after them are fed, except the last one, which is only predicted. If `read` is
            `first`, the last token that was read is fed again. 0 for texts that are fed as a whole.
        results: what an error calls the text's results.
    """

    ids: Sequence[int]
    first: int
    read: int = 0
    results: str = "the losses of the text"


@dataclass(frozen=True)
class Judged:
    """The judged tokens of a text.

    Attributes:
        wanted: the tokens.
        losses: their negative log-likelihoods, nats.
        likely: the most likely tokens in their places; NO_TOKEN where logits are not finite.
    """

    wanted: Int[np.ndarray, " J"]
    losses: Float[np.ndarray, " J"]
    likely: Int[np.ndarray, " J"]

    @property
    def right(self) -> bool:
        """Whether each token is the most likely one: greedy decoding would write all of them."""
        return bool((self.likely == self.wanted).all())


def judge_dense(
    model: Transformer, params: Any, texts: Sequence[Text], batch_size: int
) -> Iterator[list[Judged]]:
    """Judges texts by one forward pass without a cache; all of them have `read` 0.

    Returns:
        For each batch of `batch_size` texts, the judged tokens of each text.

    Raises:
        ValueError: a batch size below 1, or results that are not finite.
    """
    for start, batch in _batches(texts, batch_size):
        yield _feed(model, params, batch)[: len(texts) - start]


def judge_compressed(
    model: Transformer,
    params: Any,
    texts: Sequence[Text],
    policies: Mapping[Any, Policy],
    batch_size: int,
) -> Iterator[tuple[Any, list[Judged], int]]:
    """Judges texts from the caches that policies leave after reading a part of each text.

    Returns:
        For each batch of `batch_size` texts, and within one for each policy, the policy's key, the
        judged tokens of each text, and the bytes of the batch's cache before the texts are fed,
        with room for what follows.

    Raises:
        ValueError: a batch size below 1, a policy that bounds the growth of the cache (see
            `Policy.bounds_growth`), or results that are not finite.
    """
    check_growth(policies.values(), "known text")
    params = on_automatic_mesh(params)
    reader = from_start(model, params, list(policies.values()))
    for start, batch in _batches(texts, batch_size):
        for key, judged, held in _judge_batch(model, params, batch, list(policies), reader):
            yield key, judged[: len(texts) - start], held


@automatic_axes()
def _judge_batch(
    model: Transformer, params: Any, texts: Sequence[Text], keys: Sequence[Any], reader: Reader
) -> list[tuple[Any, list[Judged], int]]:
    """`judge_compressed` of one batch; the reader reads it under the policies with these keys."""
    read = [text.ids[: text.read] for text in texts]
    tokens, lengths = pad(read, bucket_length(max(map(len, read))))
    room = max(len(text.ids) - text.read for text in texts)
    again, found = [text.read == text.first for text in texts], []
    for key, start in zip(keys, reader.read(tokens, lengths, room), strict=True):
        held, cache = cache_bytes(start.cache), without_last(start.cache, again)
        judged = _feed(model, params, texts, cache, f" under policy {key!r}")
        found.append((key, judged, held))
    return found


def _batches(texts: Sequence[Text], size: int) -> Iterator[tuple[int, list[Text]]]:
    """Batches of one size, each with the index of its first text. The last one is filled with
    copies of a text, so that all batches share their programs."""
    check_ranges({"batch_size": size}, {"batch_size": COUNT})
    for start in range(0, len(texts), size):
        batch = list(texts[start : start + size])
        yield start, batch + batch[:1] * (size - len(batch))


def _feed(
    model: Transformer,
    params: Any,
    texts: Sequence[Text],
    cache: Any = None,
    under: str = "",
) -> list[Judged]:
    """Feeds the tokens after those that a cache holds, and judges the token after each fed one.

    Args:
        cache: holds the tokens before those to feed, with room for the others; it is used up.
        under: ends the name of results that are not finite.
    """
    begins = [min(text.read, text.first - 1) for text in texts]
    rests = [text.ids[begin:] for text, begin in zip(texts, begins, strict=True)]
    longest = max(1, max(map(len, rests)) - 1)
    # Without a cache there is one piece. Otherwise the pieces of a text share one program.
    size = bucket_length(longest) if cache is None else min(bucket_length(longest), PIECE)
    slots = -(-longest // size) * size
    tokens, lengths = pad(rests, slots + 1)
    # The token after a fed one has index `after`. A text's last token is not fed.
    begin, first = np.asarray([begins, [text.first for text in texts]], np.int32)[..., None]
    after = begin + np.arange(1, slots + 1, dtype=np.int32)
    fed = after < begin + lengths[:, None]
    positions = np.where(fed, after - 1, -1)
    wanted = np.where(fed & (after >= first), tokens[:, 1:], -1)
    found = []
    for start in range(0, slots, size):
        part = np.s_[:, start : start + size]
        x, cache = hidden_states(model, params, tokens[:, :-1][part], positions[part], cache)
        found.append(judge(model, params, x, wanted[part]))
    losses, likely = (np.concatenate(list(map(np.asarray, x)), 1) for x in zip(*found, strict=True))
    rows = zip(wanted, losses, likely, wanted >= 0, strict=True)
    judged = [Judged(w[asked], loss[asked], best[asked]) for w, loss, best, asked in rows]
    for text, own in zip(texts, judged, strict=True):
        if NO_TOKEN in own.likely or not np.isfinite(own.losses).all():
            raise not_finite(f"{text.results}{under}", model, params, text.ids)
    return judged


def accuracy(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> float:
    """The share of examples with every token of the answer right, and the end-of-sequence token."""
    found = predictions(model, params, examples, eos_id, batch_size)
    right = [ids == [*example.answer, eos_id] for ids, example in zip(found, examples, strict=True)]
    return float(np.mean(right)) if right else float("nan")


def predictions(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> list[list[int]]:
    """The teacher-forced answer of every example, and the token after it, without a cache.

    Args:
        batch_size: examples in one forward pass.

    Returns:
        len(answer) + 1 ids for each example; the last one is `eos_id` if the model ends there.

    Raises:
        ValueError: logits that are not finite.
    """
    texts = [
        Text([*e.prompt, *e.answer, eos_id], len(e.prompt), 0, f"the logits of example {index}")
        for index, e in enumerate(examples)
    ]
    parts = judge_dense(model, params, texts, batch_size)
    return [own.likely.tolist() for part in parts for own in part]


def chunk_losses(
    model: Transformer, params: Any, tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T-1"]:
    """Negative log-likelihood, in nats, of every token but the first of each chunk; fp32.

    Raises:
        ValueError: tokens that are no ids [B, T] of the model, parameters of another model, or
            losses that are not finite.
    """
    check_fits(model, params)
    rows = token_ids(tokens, model.config.vocab_size, "the text")
    if rows.ndim != 2:
        raise ValueError(f"got tokens of shape {rows.shape}, expected [B, T] in each batch")
    texts = [Text(row, 1) for row in rows.tolist()]
    (judged,) = judge_dense(model, params, texts, len(texts))
    return np.stack([own.losses for own in judged])


def perplexity(model: Transformer, params: Any, batches: Iterable[np.ndarray]) -> float:
    """exp of the mean loss over all predictions of all chunks.

    Args:
        batches: int32 [B, T] each. B and T may differ; each bucket of lengths compiles once.

    Raises:
        ValueError: no batch, or only chunks of one token, which leave nothing to predict; or losses
            that are not finite.
    """
    total, count = 0.0, 0
    for tokens in batches:
        losses = chunk_losses(model, params, tokens)
        total, count = total + losses.sum(dtype=np.float64), count + losses.size
    if count == 0:
        raise ValueError("got no token to predict, expected chunks of at least two tokens")
    return float(np.exp(total / count))


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


def compare(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    policies: Mapping[str, str | Policy],
    protocol: str = INSIDE,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Compared:
    """Judges every answer under every policy, and with the full cache (the policy "full").

    An answer counts as right if each of its tokens is the most likely one, and the EOS after it
    where the example says so: greedy decoding would write this answer, if its first token too came
    from the compressed cache. In `kvjax.generate` the prefill predicts the first token, before the
    cache is compressed.

    Args:
        policies: by name, each as `kvjax.generate` takes it.
        protocol: "inside" or "after", see `PROTOCOLS`.
        batch_size: examples at a time.
        on_batch: called with the number of finished examples.

    Raises:
        ValueError: an unknown protocol; no examples; examples without the length of their
            question, or with tokens outside the vocabulary; a model without EOS; a policy that
            cannot be resolved; or logits that are not finite.
    """
    config = model.config
    _check_examples(config, examples, protocol)
    named = {FULL: Full(), **policies}
    every = dict(zip(named, resolve_each(list(named.values()), config), strict=True))
    asked = [example.question_length if protocol == AFTER else 0 for example in examples]
    reads = [len(example.prompt) - n for example, n in zip(examples, asked, strict=True)]
    texts = []
    for index, (example, read) in enumerate(zip(examples, reads, strict=True)):
        ids = [*example.prompt, *example.answer, *config.eos_ids[: example.then_eos]]
        texts.append(Text(ids, len(example.prompt), read, f"the logits of example {index}"))
    right: dict[str, list[bool]] = {name: [] for name in every}
    for name, judged, _ in judge_compressed(model, params, texts, every, batch_size):
        right[name] += [own.right for own in judged]
        if on_batch is not None and name == list(every)[-1]:
            on_batch(len(right[name]))
    # Cache bytes follow from shapes alone.
    longest, dtype = max(reads), params["embedding"].dtype
    sizes = {name: prompt_bytes(policy, config, longest, dtype) for name, policy in every.items()}
    return Compared({name: np.asarray(found) for name, found in right.items()}, sizes)


def _check_examples(config: ModelConfig, examples: Sequence[Example], protocol: str) -> None:
    if not examples:
        raise ValueError("got no examples, expected at least one")
    if not config.eos_ids and any(example.then_eos for example in examples):
        raise ValueError("the model has no EOS id, expected one after an answer with then_eos")
    for index, example in enumerate(examples):
        token_ids([*example.prompt, *example.answer], config.vocab_size, f"example {index}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    silent = [i for i, example in enumerate(examples) if not example.question_length]
    if protocol == AFTER and silent:
        raise ValueError(
            f"example {silent[0]} has question_length 0, expected the number of its question's "
            f"tokens: protocol {AFTER!r} feeds them after the compression"
        )
