"""Prepares prompts for the device: checks, length buckets, padding, and random keys."""

from __future__ import annotations

import numbers
import operator
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32, UInt32

from kvjax.config import ModelConfig

SMALLEST_BUCKET = 32
LISTS = "a list of lists of token ids"
PROMPT = "a list of token ids (prompts are a list of such lists)"


def check_prompts(config: ModelConfig, prompts: Any, max_new_tokens: Any, before: int = 0) -> None:
    """Raises ValueError for prompts that this model cannot continue.

    Args:
        before: number of context tokens that precede every prompt.
    """
    try:
        new = operator.index(max_new_tokens)
    except TypeError:
        new = 0
    if new < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}, expected a whole number ≥ 1")
    # Name the first bad prompt, and what is wrong with it.
    for index in range(_count(prompts)):
        ids = _token_ids(prompts[index], f"prompt {index}", PROMPT)
        if not ids.size:
            raise ValueError(f"prompt {index} is empty, expected at least one token")
        if before + ids.size + new > config.context_length:
            raise ValueError(
                f"prompt {index} has {ids.size} tokens and max_new_tokens is {new}, "
                f"expected at most {config.context_length} in all: the model's context"
            )
        low, high = ids.min(), ids.max()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {index} has token {low if low < 0 else high}, "
                f"expected ids of 0 to {config.vocab_size - 1}"
            )


def eos_array(config: ModelConfig, eos_ids: Any) -> Int32[np.ndarray, " E"]:
    """The ids that end a sequence: one id or several, or the model's own for None.

    Raises:
        ValueError: another value.
    """
    if eos_ids is None:
        eos_ids = config.eos_ids
    elif isinstance(eos_ids, Set):
        eos_ids = sorted(eos_ids)
    elif isinstance(eos_ids, numbers.Integral) or getattr(eos_ids, "ndim", 1) == 0:
        eos_ids = [eos_ids]
    ids = _token_ids(eos_ids, "eos_ids", "None, () or a list of token ids")
    if ids.size and not -(2**31) <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"eos_ids are {eos_ids}, expected token ids of the model")
    return ids.astype(np.int32)


def _count(prompts: Any) -> int:
    """The number of prompts."""
    _refuse_text(prompts, "prompts", LISTS)
    try:
        count = len(prompts)
    except TypeError:
        count = None
    if count is None or not hasattr(prompts, "__getitem__"):
        raise ValueError(f"prompts: got {_kind(prompts)}, expected {LISTS}")
    if not count:
        raise ValueError("got no prompts, expected at least one")
    return count


def _token_ids(value: Any, name: str, expected: str) -> np.ndarray:
    """Integers as a one-dimensional array.

    Raises:
        ValueError: the value is not a list of integers.
    """
    _refuse_text(value, name, expected)
    try:
        ids = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: got lists of several lengths, expected {expected}") from None
    except TypeError:
        raise ValueError(f"{name}: got {_kind(value)}, expected {expected}") from None
    if ids.ndim == 0:
        raise ValueError(f"{name}: got {_kind(value)}, expected {expected}")
    if ids.ndim > 1:
        raise ValueError(f"{name}: got ids of shape {ids.shape}, expected {expected}")
    if not ids.size:
        return np.zeros(0, np.int32)
    # NumPy gives object or float arrays for mixed lists: accept those of exact ints only.
    if ids.dtype.kind not in "iu" and not all(type(i) is int for i in ids.tolist()):
        kind = next(_kind(i) for i in ids.tolist() if type(i) is not int)
        raise ValueError(f"{name}: got {kind} among the token ids, expected {expected}")
    return ids


def _refuse_text(value: Any, name: str, expected: str) -> None:
    """Raises ValueError for the two usual mistakes, and says what to pass instead."""
    if isinstance(value, str | bytes):
        raise ValueError(
            f"{name}: got text, expected {expected}: encode it with kvjax.load_tokenizer"
        )
    if isinstance(value, Mapping):
        raise ValueError(
            f"{name}: got {type(value).__name__}, expected {expected}: "
            "pass tokenizer(...)['input_ids']"
        )


def _kind(value: Any) -> str:
    """Describes a value in one line, for an error message."""
    if value is None or isinstance(value, numbers.Number):
        return str(value)
    return "text" if isinstance(value, str | bytes) else type(value).__name__


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, … that holds `length` tokens."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


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


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] and lengths [B], int32."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def prompt_words(prompts: Sequence[Sequence[int]]) -> UInt32[np.ndarray, "B 2"]:
    """Two numbers that identify a prompt: a checksum, and how often it came before in the list."""
    # The count tells equal prompts apart, so that repeating a prompt gives new samples.
    seen: Counter[int] = Counter()
    words = []
    for prompt in prompts:
        checksum = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        words.append((checksum, seen[checksum]))
        seen[checksum] += 1
    return np.asarray(words, np.uint32)


@jax.jit
def prompt_keys(key: jax.Array, words: UInt32[Array, "B 2"]) -> jax.Array:
    """[B] random keys from a key and the two numbers of each prompt."""

    def fold(pair: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1])

    return jax.vmap(fold)(words)
