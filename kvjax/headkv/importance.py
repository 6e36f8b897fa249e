"""Head importance: what each query head does while the model answers (HeadKV, section 3.2).

The answer is teacher-forced, so that one forward pass gives the attention of all its steps; the
attention of a layer is reduced to one number a head before the next layer runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.answers import rouge1_recall, token_f1
from kvjax.example import Example
from kvjax.headkv.plan import attention_spec, kv_heads, no_head_budget, start_prompt
from kvjax.headkv.prompt import Prompt, query_attention
from kvjax.headkv.scores import HeadScores, query_heads
from kvjax.nn import Transformer

BUCKET = 64  # lengths are padded to multiples of it, so that few programs are compiled


@flax.struct.dataclass
class Batch:
    """Examples of one length bucket; the answer follows the prompt, its last token left out.

    Attributes:
        tokens: [B, S] int32, right-padded.
        lengths: [B] valid tokens, n + m − 1 for a prompt of n tokens and an answer of m.
        answers: [B, M] the answer tokens, at the end of the row: step t = r − (M − m).
        steps: [B, M] bool, rows that are steps.
        span: [B, S] bool, where the answer stands in the prompt.
    """

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    answers: Int[Array, "B M"]
    steps: Bool[Array, "B M"]
    span: Bool[Array, "B S"]


Reduce = Callable[[jax.Array, Batch], jax.Array]
"""Attention of the steps [B, N, M, S] fp32 to one score a head [B, N]."""


class Estimator(NamedTuple):
    """How attention becomes a score, and how well an answer must be predicted to count (> 0.5)."""

    reduce: Reduce
    gate: Callable[[Sequence[int], Sequence[int]], float]


def copied(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval heads (arXiv 2404.15574): steps whose most attended token is the next one.

    That token must stand in the span, whose length divides the count.
    """
    top = jnp.argmax(attention_BNMS, axis=-1)
    rows = jnp.arange(top.shape[0], dtype=jnp.int32)[:, None, None]
    hit = batch.span[rows, top] & (batch.tokens[rows, top] == batch.answers[:, None])
    count = jnp.sum(hit & batch.steps[:, None], axis=2, dtype=jnp.int32)
    return count.astype(jnp.float32) / span_length(batch)[:, None].astype(jnp.float32)


def attended(attention_BNMS: Float[Array, "B N M S"], batch: Batch) -> Float[Array, "B N"]:
    """Retrieval-reasoning heads (arXiv 2410.19258, eq. 2): attention on the span, if it ranks high.

    Summed over the steps and those tokens of the span that are among the N most attended ones,
    divided by N, the length of the span. Of equals the earlier position ranks higher.
    """
    length = span_length(batch)
    order = jnp.argsort(-attention_BNMS, axis=-1, stable=True)
    weight = jnp.take_along_axis(attention_BNMS, order, axis=-1)
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None, None, None]
    ranks = jnp.arange(order.shape[3], dtype=jnp.int32)[None, None, None]
    counts = batch.span[rows, order] & (ranks < length[:, None, None, None])
    counts &= batch.steps[:, None, :, None]
    total = jnp.sum(jnp.where(counts, weight, 0.0), axis=(2, 3))
    return total / length[:, None].astype(jnp.float32)


def span_length(batch: Batch) -> Int[Array, " B"]:
    """N, tokens of the span."""
    return jnp.sum(batch.span, axis=1, dtype=jnp.int32)


ESTIMATORS = {
    "retrieval": Estimator(copied, rouge1_recall),
    "retrieval_reasoning": Estimator(attended, token_f1),
    "enhanced_retrieval": Estimator(attended, token_f1),
}
"""The paper's three; the last two differ in their examples (reasoning, plain needles)."""


def score_examples(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    estimator: str | Estimator = "retrieval_reasoning",
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> HeadScores:
    """Importance of every query head, one score for each example that the model answers.

    Args:
        examples: prompts with their answers and where these stand.
        estimator: a name of ESTIMATORS, or your own.
        batch_size: examples at a time.
        on_batch: called with the number of examples done.

    Returns:
        scores whose meta lists every sample: name, length, depth, gate score, accepted.

    Raises:
        ValueError: an unknown estimator, no example, a span outside of its prompt, or none
            answered.
        NotImplementedError: a layer whose heads have no keys of their own.
    """
    name, chosen = _estimator(estimator)
    check_model(model)
    check_examples(examples)
    steps = max(len(example.answer) for example in examples)
    scores = np.zeros((len(examples), *query_heads(model.config)))
    gates = np.zeros(len(examples))
    done = 0
    for indices in bucketed(examples, batch_size):
        chunk = [examples[i] for i in indices]
        batch = make_batch(chunk, steps, batch_size)
        values, predicted = score_batch(model, params, batch, chosen.reduce)
        scores[indices] = np.asarray(values, np.float64)[: len(chunk)]
        for index, example, row in zip(indices, chunk, np.asarray(predicted), strict=False):
            answer = example.answer
            gates[index] = chosen.gate(row[steps - len(answer) :].tolist(), answer)
        done += len(chunk)
        if on_batch is not None:
            on_batch(done)
    accepted = gates > 0.5
    if not accepted.any():
        raise ValueError(
            f"the model answers none of {len(examples)} examples (best score {gates.max():.2f}, "
            "expected > 0.5), so that no head can be scored"
        )
    meta = {
        "estimator": name,
        "num_layers": model.config.num_layers,
        "num_heads": scores.shape[2],
        "num_kv_heads": kv_heads(model.config),
        "samples": [
            provenance(*row) for row in zip(examples, gates.tolist(), accepted, strict=True)
        ],
    }
    return HeadScores(np.moveaxis(scores[accepted], 0, 2), meta)


@functools.partial(jax.jit, static_argnames=("model", "reduce"))
def score_batch(
    model: Transformer, params: Any, batch: Batch, reduce: Reduce
) -> tuple[Float[Array, "B L N"], Int[Array, "B M"]]:
    """Scores of every head, and the token that the model expects at each step."""

    def apply(*args: Any, method: str) -> Any:
        return model.apply({"params": params}, *args, method=method)

    B, S = batch.tokens.shape
    M = batch.steps.shape[1]
    positions = jnp.arange(S, dtype=jnp.int32)[None]
    positions = jnp.where(positions < batch.lengths[:, None], positions, -1)
    x = apply(batch.tokens, method="embed")
    scores = []
    for index, layer in enumerate(model.config.layers):
        cache = start_prompt(layer.attention, B, S, M, x.dtype)
        x, cache = apply(index, x, positions, cache, batch.lengths, method="layer")
        prompt = Prompt.create(cache, attention_spec(layer.attention))
        scores.append(reduce(query_attention(prompt), batch))
    last = batch.lengths[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None]
    x = jnp.take_along_axis(x, jnp.maximum(last, 0)[..., None], axis=1)
    logits = apply(x, method="unembed")
    return jnp.stack(scores, axis=1), jnp.argmax(logits, axis=-1).astype(jnp.int32)


def make_batch(examples: Sequence[Example], steps: int, batch_size: int) -> Batch:
    """Arrays of a few examples of one bucket, the last repeated up to the batch size."""
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


def model_input_length(example: Example) -> int:
    """Tokens that the model reads: the prompt and all of the answer but its last token."""
    return len(example.prompt) + len(example.answer) - 1


def bucket_length(example: Example) -> int:
    """The padded length of an example."""
    return -(-model_input_length(example) // BUCKET) * BUCKET


def bucketed(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices of examples that share a bucket, at most `batch_size` together."""
    buckets: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        buckets.setdefault(bucket_length(example), []).append(index)
    return [
        indices[start : start + batch_size]
        for indices in buckets.values()
        for start in range(0, len(indices), batch_size)
    ]


def provenance(example: Example, gate: float, accepted: np.bool_) -> dict[str, Any]:
    """What the meta companion says about one sample."""
    return {
        "name": example.name,
        "length": len(example.prompt),
        "depth": example.depth,
        "score": gate,
        "accepted": bool(accepted),
    }


def check_model(model: Transformer) -> None:
    """Raises NotImplementedError for a layer whose heads have no keys of their own."""
    for index, layer in enumerate(model.config.layers):
        reason = no_head_budget(layer.attention)
        if reason is not None:
            raise NotImplementedError(f"the heads of layer {index} cannot be scored: {reason}")


def check_examples(examples: Sequence[Example]) -> None:
    """Raises ValueError for examples that cannot be scored."""
    if not examples:
        raise ValueError("got no examples, expected at least one")
    for index, example in enumerate(examples):
        start, end = example.span
        if not example.answer or not 0 <= start < end <= len(example.prompt):
            raise ValueError(
                f"example {index} has span {example.span}, {len(example.prompt)} prompt and "
                f"{len(example.answer)} answer tokens, expected an answer and a span in the prompt"
            )


def _estimator(estimator: str | Estimator) -> tuple[str, Estimator]:
    if not isinstance(estimator, str):
        return getattr(estimator.reduce, "__name__", "custom"), estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    return estimator, ESTIMATORS[estimator]
