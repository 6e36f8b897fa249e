"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from kvjax.context import compress, load_context
from kvjax.encoding import end_ids, ids_after, prompt_ids
from kvjax.generation import generate
from kvjax.headkv import Policy
from kvjax.hf import load, load_tokenizer, read_model
from kvjax.mesh import named_mesh
from kvjax.ranges import COUNT, Range, check_ranges
from kvjax.text import TextStream
from kvjax.token_ids import token_ids


def generate_text(
    path: str,
    prompt: str,
    dtype: str = "float32",
    write: Callable[[str], None] | None = None,
    context: Path | None = None,
    policy: str = "full",
    mesh: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Continues `prompt` with the checkpoint at `path`.

    Args:
        write: called with pieces of the new text as they are ready.
        mesh: devices to spread over, see `kvjax.mesh.parse_mesh`; None for one.
        context: a file that `compress_text` wrote; the prompt follows its text as it is written.
        settings: of `kvjax.generate`. Without eos_ids, the model's and the tokenizer's EOS and the
            end of a turn in the chat template end the text.

    Returns:
        prompt, text, prompt_tokens, new_tokens, policy, cache_bytes, full_cache_bytes.

    Raises:
        ValueError: see `kvjax.load` and `kvjax.generate`.
    """
    if not prompt:
        raise ValueError("the prompt is empty, expected text")
    if context is None:
        Policy.parse(policy)  # a policy that cannot be had is refused before a model is read
    tokenizer = load_tokenizer(path)
    model, params = load(path, dtype=dtype, mesh=named_mesh(mesh))
    held = None if context is None else load_context(context, model, params)
    if held is None:
        ids = prompt_ids(tokenizer, prompt)
    else:  # the context has begun with BOS
        ids = ids_after(tokenizer, prompt.removeprefix(tokenizer.bos_token or ""))
    stream, pieces = TextStream(tokenizer, ids), []

    def show(piece: str) -> None:
        pieces.append(piece)
        if write is not None and piece:
            write(piece)

    out = generate(
        model,
        params,
        [ids],
        policy=policy,
        on_tokens=lambda _, new: show(stream.add(new)),
        context=held,
        **{"eos_ids": end_ids(tokenizer, model.config, chat=True), **settings},
    )
    show(stream.end())
    return {
        "prompt": prompt,
        "text": "".join(pieces),
        "prompt_tokens": len(ids),
        "new_tokens": len(out.tokens[0]),
        "policy": policy if held is None else held.policy,
        "cache_bytes": out.cache_bytes,
        "full_cache_bytes": out.full_cache_bytes,
    }


def compress_text(path: str, text: Path, out: Path, policy: str, dtype: str) -> dict[str, Any]:
    """Reads a text file with the checkpoint at `path` and writes what the policy keeps to `out`.

    Returns:
        tokens, policy, cache_bytes, file_bytes.

    Raises:
        ValueError: an empty or missing text, and see `kvjax.compress`.
    """
    if not text.is_file():
        raise ValueError(f"no text file at {text}")
    Policy.parse(policy)
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is no text in UTF-8: {error}") from None
    model, params = load(path, dtype=dtype)
    ids = prompt_ids(load_tokenizer(path), content)
    context = compress(model, params, ids, policy)
    out.parent.mkdir(parents=True, exist_ok=True)
    context.save(out)
    return {
        "tokens": context.length,
        "policy": policy,
        "cache_bytes": context.nbytes,
        "file_bytes": out.stat().st_size,
    }


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
