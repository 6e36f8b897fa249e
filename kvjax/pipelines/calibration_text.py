"""Text or token files as sequences for calibration, and the part of them that is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer

from kvjax.checks import COUNT, Range, check_ranges, token_ids
from kvjax.hf import load_tokenizer, read_model
from kvjax.text import prompt_ids

RANGES = {"tokens": COUNT, "length": Range(least=2, most=2**31 - 1, whole=True)}
HELD_OUT = 8  # one sequence in so many decides and reports, the others calibrate


def calibration_tokens(
    source: str, path: Path, tokens: int, length: int
) -> tuple[Int[np.ndarray, "S T"], Int[np.ndarray, "H T"]]:
    """Sequences to calibrate on, and held-out ones that take every eighth place.

    Args:
        source, path, tokens, length: as of `token_rows`.

    Raises:
        ValueError: what `token_rows` raises, or a single sequence.
    """
    rows = token_rows(source, path, tokens, length)
    if len(rows) < 2:
        raise ValueError(
            f"{path} gives one sequence of {rows.size} tokens, expected one to hold out"
        )
    held = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        held[-1] = True
    return rows[~held], rows[held]


def token_rows(source: str, path: Path, tokens: int, length: int) -> Int[np.ndarray, "S T"]:
    """Token ids of a file, one sequence a row.

    Args:
        source: model whose tokenizer reads the file.
        path: a text, or an .npy file of token ids [S, T], which are taken as they are.
        tokens: how many to use at most, but for a first sequence.
        length: tokens a sequence, for texts; at least two, and no more than the model's context.

    Raises:
        ValueError: no such file, ids of another shape or dtype, such that the model does not have,
            sequences beyond its context, or a text shorter than one sequence.
    """
    check_ranges({"tokens": tokens, "length": length}, RANGES)
    if not path.is_file():
        raise ValueError(f"no calibration file {path}")
    config = read_model(source).config
    read = _read_ids if path.suffix == ".npy" else _encode
    rows = token_ids(read(source, path, tokens, length), config.vocab_size, str(path))
    if not 2 <= rows.shape[1] <= config.context_length:
        raise ValueError(
            f"{path}: got sequences of {rows.shape[1]} tokens, expected 2 to "
            f"{config.context_length}, the model's context"
        )
    return rows


def _read_ids(source: str, path: Path, tokens: int, length: int) -> Integer[np.ndarray, "S T"]:
    try:
        rows = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of token ids: {error}") from None
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"{path} holds {rows.dtype} {rows.shape}, expected integers [S, T]")
    return rows[: max(1, tokens // max(1, rows.shape[1]))]


def _encode(source: str, path: Path, tokens: int, length: int) -> Int[np.ndarray, "S T"]:
    try:
        # No more text than can be needed: few tokens have more than sixteen characters.
        text = path.read_text(encoding="utf-8")[: 16 * tokens]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    ids = np.asarray(prompt_ids(load_tokenizer(source), text), np.int64)[:tokens]
    if len(ids) < length:
        raise ValueError(f"{path} has {len(ids)} tokens, expected at least {length}")
    return ids[: len(ids) // length * length].reshape(-1, length)
