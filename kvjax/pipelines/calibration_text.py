"""Text or token files as sequences for calibration, and the part of them that is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int

from kvjax.hf import load_tokenizer

HELD_OUT = 8  # one sequence in so many decides and reports, the others calibrate


def calibration_tokens(
    source: str, path: Path, tokens: int, length: int
) -> tuple[Int[np.ndarray, "S T"], Int[np.ndarray, "H T"]]:
    """Sequences to calibrate on, and held-out ones that take every eighth place.

    Args:
        source: model whose tokenizer reads the file.
        path: a text, or an .npy file of token ids [S, T], which are taken as they are.
        tokens: how many tokens to use at most, in all.
        length: tokens a sequence, for texts.

    Raises:
        ValueError: a file that is missing, or too short for two sequences.
    """
    if not path.is_file():
        raise ValueError(f"no calibration file {path}")
    if path.suffix == ".npy":
        ids = np.load(path).astype(np.int32)
        if ids.ndim != 2:
            raise ValueError(f"{path} holds an array of shape {ids.shape}, expected [S, T]")
    else:
        text = path.read_text(encoding="utf-8")
        # No more text than can be needed: a token has a character at least.
        encoded = load_tokenizer(source)(text[: 16 * tokens], add_special_tokens=False)
        flat = np.asarray(encoded["input_ids"], np.int32)[:tokens]
        ids = flat[: len(flat) // length * length].reshape(-1, length)
    ids = ids[: max(tokens // max(ids.shape[1], 1), 2)]
    if len(ids) < 2:
        raise ValueError(
            f"{path} gives {ids.size} tokens, expected at least two sequences of {length}"
        )
    held = np.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        held[-1] = True
    return ids[~held], ids[held]
