"""The examples that head importance is measured on: their questions, batches and formulas.

A `Grid` describes the examples, and `make_examples` generates them in a tokenizer's tokens.
`make_batch` makes arrays of examples of one length. The formulas turn the attention of an answer's
steps into the importance of each head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.chat import has_chat_template
from kvjax.checks import COUNT, SEED, check_ranges
from kvjax.config import ModelConfig
from kvjax.example import Example
from kvjax.tasks import needle, repeated_spans, two_hop
from kvjax.tasks.prompt import Filler, read_haystack
from kvjax.tasks.words import TokenizerVocabulary

BUCKET = 64  # lengths are padded to multiples of BUCKET, so that few programs are compiled
LENGTHS = 4  # prompt lengths of the grid, evenly spaced up to the longest
LEAST_HAYSTACK = 16  # tokens of filler in the shortest prompt
COPIED_LENGTH = 64  # tokens that the copying estimator copies: fewer give a less stable ranking
NEED = "need"
"""Curves of need in place of importance, see `kvjax.headkv.need`."""
NEEDLES, THINGS = (7, 3, 12, 5), (2, 1, 4, 3)
"""Lengths of the answers of its needles and two-hop questions, in turn: digits or words."""
DISTRACTORS = 3  # examples have 0, 1 and 2 distractors in turn
RANGES = {"samples": COUNT, "length": COUNT, "seed": SEED}
"""Allowed values of the numbers of a `Grid`."""


@dataclass(frozen=True)
class Grid:
    """The examples that importance is measured on.

    Prompts have four lengths: a quarter of the samples each have 1/4, 2/4, 3/4 and all of `length`,
    or the shortest length that holds the facts. Facts are at evenly spaced depths.

    Attributes:
        estimator: retrieval, retrieval_reasoning, enhanced_retrieval, copying, gradient or need
        samples: number of examples
        length: longest prompt, in tokens
        seed: seed of the facts, the filler and the random spans
        haystack: text file whose sentences hide the facts, instead of generated sentences
    """

    estimator: str = "retrieval_reasoning"
    samples: int = 64
    length: int = 512
    seed: int = 0
    haystack: Path | None = None


Question = Callable[..., Example]
"""Makes one example from (rng, vocab, length, index of the sample, depth, filler)."""


def _facts(generate: Callable[..., Example]) -> Question:
    def ask(rng, vocab, length, index, depth, filler):
        distractors = index % DISTRACTORS
        return generate(rng, vocab, length, distractors=distractors, depth=depth, filler=filler)

    return ask


def _mixture(rng, vocab, length, index, depth, filler):
    generate, lengths = ((needle.generate, NEEDLES), (two_hop.generate, THINGS))[index % 2]
    size = lengths[index // 2 % len(lengths)]
    return generate(rng, vocab, length, answer_length=size, depth=depth, filler=filler)


def _random_span(rng, vocab, length, index, depth, filler):
    if filler is not None:
        raise ValueError("the copying estimator asks for random tokens, expected no haystack")
    ids = vocab.ordinary_ids
    return repeated_spans.generate(rng, vocab, length, COPIED_LENGTH, depth=depth, ids=ids)


QUESTIONS: dict[str, Question] = {
    "retrieval": _facts(needle.generate),
    "enhanced_retrieval": _facts(needle.generate),
    "retrieval_reasoning": _facts(two_hop.generate),
    "copying": _random_span,
    "gradient": _facts(two_hop.generate),
    NEED: _mixture,
}
"""The questions of each estimator. The first three ask the kinds of questions of the HeadKV paper
(arXiv 2410.19258, 3.1) with other prompts and answers: docs/headkv.md lists the differences."""


def make_examples(tokenizer: Any, grid: Grid) -> list[Example]:
    """The examples of a grid, in the tokens of a tokenizer and its chat template, if it has one.

    Raises:
        ValueError: an unknown estimator, or numbers or a haystack that `score_heads` refuses.
    """
    if grid.estimator not in QUESTIONS:
        raise ValueError(f"estimator is {grid.estimator!r}, expected one of {', '.join(QUESTIONS)}")
    check_ranges(vars(grid), RANGES)
    vocab = TokenizerVocabulary(tokenizer, has_chat_template(tokenizer))
    filler = None if grid.haystack is None else read_haystack(grid.haystack, vocab)
    rng = np.random.default_rng(grid.seed)
    depths = np.linspace(0.0, 1.0, grid.samples).tolist()
    return [_ask(rng, vocab, grid, index, depth, filler) for index, depth in enumerate(depths)]


def check_length(length: int, config: ModelConfig) -> None:
    """Raises ValueError if the longest prompt of a grid does not fit into the model's context."""
    check_ranges({"length": length}, {"length": RANGES["length"]})
    if length > config.context_length:
        raise ValueError(
            f"length is {length}, expected at most {config.context_length}: the model's context"
        )


def _ask(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    grid: Grid,
    index: int,
    depth: float,
    filler: Filler | None,
) -> Example:
    """One sample of the grid, long enough for its facts and at least LEAST_HAYSTACK of filler."""
    ask = QUESTIONS[grid.estimator]
    # A copy of the generator finds the length of the facts and leaves the random numbers unused.
    facts = ask(copy.deepcopy(rng), vocab, None, index, depth, filler)
    shortest = len(facts.prompt) + LEAST_HAYSTACK
    if grid.length < shortest:
        raise ValueError(
            f"got length {grid.length}, expected ≥ {shortest} for facts, question and some filler"
        )
    length = grid.length * (index % LENGTHS + 1) // LENGTHS
    return ask(rng, vocab, max(length, shortest), index, depth, filler)


@flax.struct.dataclass
class Batch:
    """Examples of one length bucket: each prompt with its answer, without the answer's last token.

    Attributes:
        tokens: [B, S] int32, right-padded.
        lengths: [B] valid tokens: n + m − 1 for a prompt of n tokens and an answer of m.
        answers: [B, M] the answer tokens, right-aligned: row r is step t = r − (M − m).
        steps: [B, M] bool, rows that are steps.
        span: [B, S] bool, tokens of the prompt that contain the answer.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    answers: Int[Array, "B M"]
    steps: Bool[Array, "B M"]
    span: Bool[Array, "B S"]


def make_batch(examples: Sequence[Example], steps: int, batch_size: int) -> Batch:
    """Arrays of examples of one bucket; the last example is repeated up to the batch size."""
    rows = [*examples, *[examples[-1]] * (batch_size - len(examples))]
    shape = (batch_size, bucket_length(rows[0]))
    tokens, span = np.zeros(shape, np.int32), np.zeros(shape, bool)
    answers = np.zeros((batch_size, steps), np.int32)
    for row, example in enumerate(rows):
        ids = [*example.prompt, *example.answer[:-1]]
        tokens[row, : len(ids)] = ids
        span[row, slice(*example.span)] = True
        answers[row, steps - len(example.answer) :] = example.answer
    sizes = np.asarray([len(example.answer) for example in rows], np.int32)
    return Batch(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray([model_input_length(example) for example in rows], jnp.int32),
        answers=jnp.asarray(answers),
        steps=jnp.asarray(np.arange(steps)[None] >= steps - sizes[:, None]),
        span=jnp.asarray(span),
    )


def positions(batch: Batch) -> Int[Array, "B S"]:
    """Positions 0, 1, … of each row's tokens; −1 for padding."""
    at = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where(at < batch.lengths[:, None], at, -1)


def step_positions(batch: Batch) -> Int[Array, "B M"]:
    """Positions of the tokens that predict the answer. Rows that are not steps get some position
    ≥ 0, so that gathers stay in range."""
    M = batch.steps.shape[1]
    last = batch.lengths[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None]
    return jnp.maximum(last, 0)


def model_input_length(example: Example) -> int:
    """Tokens that the model reads: the prompt and the answer without its last token."""
    return len(example.prompt) + len(example.answer) - 1


def bucket_length(example: Example) -> int:
    """The padded length of an example."""
    return -(-model_input_length(example) // BUCKET) * BUCKET


def bucketed(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices of examples that share a bucket, at most `batch_size` in a list.

    Raises:
        ValueError: a batch size below one.
    """
    check_ranges({"batch_size": batch_size}, {"batch_size": COUNT})
    buckets: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        buckets.setdefault(bucket_length(example), []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in buckets.values()
        for start in range(0, len(indices), batch_size)
    ]


Reduce = Callable[[jax.Array, Batch], jax.Array]
"""Maps the attention of the steps [B, N, M, S] fp32 to the importance of each head [B, N]."""


def copied(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval heads (arXiv 2404.15574): how many steps copy a token of the span.

    A step counts if its most attended token is in the span and equals the step's answer token. The
    count is divided by the length of the span.
    """
    top = jnp.argmax(attention_BNMS, axis=-1)
    rows = jnp.arange(top.shape[0], dtype=jnp.int32)[:, None, None]
    hit = batch.span[rows, top] & (batch.tokens[rows, top] == batch.answers[:, None])
    count = jnp.sum(hit & batch.steps[:, None], axis=2, dtype=jnp.int32)
    return count.astype(jnp.float32) / span_length(batch)[:, None].astype(jnp.float32)


def attended(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval-reasoning heads (arXiv 2410.19258, eq. 2): attention on the span, if it ranks high.

    The sum over the steps and over the tokens of the span that are among the N most attended ones,
    divided by N, the length of the span. Of equally attended tokens the earlier one ranks higher.
    """
    length = span_length(batch)
    # A stable sort of the negated weights keeps the earlier of two equal positions first.
    order = jnp.argsort(-attention_BNMS, axis=-1, stable=True)
    weight = jnp.take_along_axis(attention_BNMS, order, axis=-1)
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None, None, None]
    ranks = jnp.arange(order.shape[3], dtype=jnp.int32)[None, None, None]
    counts = batch.span[rows, order] & (ranks < length[:, None, None, None])
    counts &= batch.steps[:, None, :, None]
    total = jnp.sum(jnp.where(counts, weight, 0.0), axis=(2, 3))
    return total / length[:, None].astype(jnp.float32)


def induced(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Induction heads (arXiv 2209.11895): attention on the token of the span that comes next.

    The mean over the steps, between 0 and 1: 1 for a head that always attends to the token that
    followed at the first occurrence. A step's targets are the tokens of the span that equal the
    step's answer token.
    """
    # [B, M, S]: the targets of each step.
    target = batch.span[:, None] & (batch.tokens[:, None] == batch.answers[..., None])
    target &= batch.steps[..., None]
    total = jnp.sum(jnp.where(target[:, None], attention_BNMS, 0.0), axis=(2, 3))
    count = jnp.sum(batch.steps, axis=1, dtype=jnp.int32)
    return total / count[:, None].astype(jnp.float32)


def span_length(batch: Batch) -> Int[Array, " B"]:
    """N, the number of tokens of the span."""
    return jnp.sum(batch.span, axis=1, dtype=jnp.int32)
