"""Examples as arrays: batches of one length bucket, the answer teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.checks import COUNT, check_ranges
from kvjax.example import Example

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


def positions(batch: Batch) -> Int[Array, "B S"]:
    """0, 1, … of each row's tokens; −1 on padding."""
    at = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where(at < batch.lengths[:, None], at, -1)


def step_positions(batch: Batch) -> Int[Array, "B M"]:
    """Positions of the tokens that predict the answer; 0 or above where a row is no step too."""
    M = batch.steps.shape[1]
    last = batch.lengths[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None]
    return jnp.maximum(last, 0)


def model_input_length(example: Example) -> int:
    """Tokens that the model reads: the prompt and all of the answer but its last token."""
    return len(example.prompt) + len(example.answer) - 1


def bucket_length(example: Example) -> int:
    """The padded length of an example."""
    return -(-model_input_length(example) // BUCKET) * BUCKET


def bucketed(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices of examples that share a bucket, at most `batch_size` together.

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
