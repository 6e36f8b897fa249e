"""Prompts on their way to the device: checked, grouped into length buckets, padded, keyed."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, UInt32

from kvjax.config import ModelConfig

SMALLEST_BUCKET = 32


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, before: int = 0
) -> None:
    """Raises ValueError for prompts that this model cannot continue.

    `before` tokens of a context come first.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected ≥ 1")
    if not len(prompts):
        raise ValueError("got no prompts, expected at least one")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        if before + len(prompt) + max_new_tokens > config.context_length:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, "
                f"expected at most {config.context_length} in all: the model's context"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {index} has token {low if low < 0 else high}, "
                f"expected ids of 0 to {config.vocab_size - 1}"
            )


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, … that holds `length` tokens."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def batches(prompts: Sequence[Sequence[int]], batch_size: int | None) -> list[list[int]]:
    """Indices of prompts that share a bucket, at most `batch_size` together."""
    by_bucket: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_bucket.setdefault(bucket_length(len(prompt)), []).append(index)
    return [
        indices[start : start + (batch_size or len(indices))]
        for _, indices in sorted(by_bucket.items())
        for start in range(0, len(indices), batch_size or len(indices))
    ]


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] and the lengths [B], int32."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def prompt_words(prompts: Sequence[Sequence[int]]) -> UInt32[np.ndarray, "B 2"]:
    """What tells prompts apart, for `prompt_keys`: a checksum, and how often it came before."""
    seen: Counter[int] = Counter()
    words = []
    for prompt in prompts:
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        words.append((checksum, seen[checksum]))
        seen[checksum] += 1
    return np.asarray(words, np.uint32)


@jax.jit
def prompt_keys(key: jax.Array, words: UInt32[Array, "B 2"]) -> jax.Array:
    """[B] keys that depend on a key, the prompt and how often it came before."""

    def fold(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1])

    return jax.vmap(fold)(words)
