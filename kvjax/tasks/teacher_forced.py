"""Answers of a model by one full forward pass: no decoding loop, no cache.

The argmax at every answer position, with the right tokens before it. An answer and its
end-of-sequence token are all right exactly when greedy decoding writes them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.checks import not_finite
from kvjax.decoding import NO_TOKEN, most_likely
from kvjax.example import Example
from kvjax.nn import Transformer

BUCKET = 128  # lengths are rounded up to a multiple, so that few shapes compile


@jax.jit
def _most_likely(logits: Float[Array, "B T V"], at: Int[Array, "B A"]) -> Int[Array, "B A"]:
    """The most likely next token after each position `at`."""
    return jnp.take_along_axis(most_likely(logits), at, axis=1)


def predictions(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> list[list[int]]:
    """The teacher-forced answer and what follows it, for every example.

    Returns:
        len(answer) + 1 ids each; the last one should be `eos_id`.

    Raises:
        ValueError: logits that are not finite.
    """
    longest_answer = max((len(example.answer) for example in examples), default=0) + 1
    out: list[list[int]] = []
    for first in range(0, len(examples), batch_size):
        chunk = examples[first : first + batch_size]
        rows = [[*example.prompt, *example.answer, eos_id] for example in chunk]
        T = -(-max(map(len, rows)) // BUCKET) * BUCKET
        tokens = np.full((batch_size, T), eos_id, np.int32)
        positions = np.full((batch_size, T), -1, np.int32)
        at = np.zeros((batch_size, longest_answer), np.int32)
        for index, (row, example) in enumerate(zip(rows, chunk, strict=True)):
            tokens[index, : len(row)] = row
            positions[index, : len(row)] = np.arange(len(row))
            count = len(example.answer) + 1
            at[index, :count] = len(example.prompt) - 1 + np.arange(count)
        arrays = jnp.asarray(tokens), jnp.asarray(positions)
        logits, _ = model.apply({"params": params}, *arrays)
        found = np.asarray(_most_likely(logits, at))
        for index, example in enumerate(chunk):
            answer = found[index, : len(example.answer) + 1].tolist()
            if NO_TOKEN in answer:
                raise not_finite(
                    f"the logits of example {first + index}", model, params, rows[index]
                )
            out.append(answer)
    return out


def accuracy(
    model: Transformer, params: Any, examples: Sequence[Example], eos_id: int, batch_size: int = 8
) -> float:
    """Share of examples answered right in every token, the ending one included."""
    found = predictions(model, params, examples, eos_id, batch_size)
    right = [ids == [*example.answer, eos_id] for ids, example in zip(found, examples, strict=True)]
    return float(np.mean(right)) if right else float("nan")
