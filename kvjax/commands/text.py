"""Texts and text files: `kvjax generate`, `kvjax compress`, and rows of tokens for calibration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from kvjax.chat import document_ids
from kvjax.checks import COUNT, Range, check_ranges, token_ids
from kvjax.context import Context, compress, digest_of, load_context
from kvjax.data_files import id_rows
from kvjax.endings import say_finished
from kvjax.hf import load, load_tokenizer, read_model
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.policies.named import parse_policy, resolve_each
from kvjax.policies.policy import Full
from kvjax.prefilling import prompt_bytes
from kvjax.progress import Stage, stage
from kvjax.text import prompt_ids
from kvjax.text_files import read_text
from kvjax.text_generation import generate_text, in_chat

RANGES = {"tokens": COUNT, "length": Range(least=2, most=2**31 - 1, whole=True)}
"""What the numbers of `token_rows` may be."""
HELD_OUT = 8
"""One calibration sequence in HELD_OUT is held out: it decides and reports, and fits nothing."""
MOST_CHARACTERS = 16
"""Characters that a token has at most, as a rule; the reader takes no more text than this needs."""


def prompt_of(prompt: str | None, file: Path | None) -> str:
    """The prompt of a command line: the argument, a file, or standard input for "-".

    Raises:
        ValueError: neither of the two or both; a missing file, or one that is not UTF-8 text; an
            empty prompt.
    """
    if (prompt is None) == (file is None):
        raise ValueError("expected PROMPT or --prompt-file FILE; PROMPT - reads standard input")
    if prompt == "-":
        prompt = sys.stdin.read()
    text = read_text(file) if prompt is None and file is not None else prompt
    if not text:
        raise ValueError("the prompt is empty, expected text")
    return text


def continue_text(
    path: str,
    prompt: str,
    dtype: str | None = None,
    write: Callable[[str], None] | None = None,
    context: Path | None = None,
    policy: str = "full",
    mesh: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`kvjax.generate_text` with the checkpoint at `path`.

    Args:
        dtype: of weights, activations and cache; None: see `kvjax.hf.default_dtype`.
        write: called with each piece of the new text when the piece is ready.
        context: a file that `compress_text` wrote. The prompt follows the text of this file, and
            the policy of the file applies.
        policy: of the cache; "full" with a `context`, which has a policy already.
        mesh: devices to shard over, see `kvjax.mesh.parse_mesh`; None for one device.
        settings: of `kvjax.generate_text`.

    Returns:
        prompt, text, prompt_tokens, new_tokens, policy, cache_bytes, full_cache_bytes, notes; and
        without a context prompt_bytes and full_prompt_bytes, see `kvjax.prefilling.prompt_bytes`.

    Raises:
        ValueError: see `kvjax.load` and `kvjax.generate_text`.
    """
    if context is None:  # refuse bad input before the model is read
        parse_policy(policy)
    tokenizer = load_tokenizer(path)
    with stage(f"loading {path}"):
        model, params = load(path, dtype=dtype, mesh=named_mesh(mesh))
        held = None if context is None else load_context(context, model, params)
    reading = Stage("reading the prompt")

    def on_text(_: int, piece: str) -> None:
        reading.end()
        if write is not None:
            write(piece)

    try:
        settings |= {"policy": policy, "context": held, "on_text": on_text}
        out = generate_text(model, params, tokenizer, prompt, **settings)
    finally:
        reading.end()
    length = len(out.prompts[0])
    report = {
        "prompt": prompt,
        "text": out.text,
        "prompt_tokens": length,
        "new_tokens": len(out.tokens[0]),
        "policy": policy if held is None else held.policy,
        "cache_bytes": out.cache_bytes,
        "full_cache_bytes": out.full_cache_bytes,
    }
    if held is None:
        rest = model.config, length, params["embedding"].dtype
        (resolved,) = resolve_each([policy], model.config)
        report["prompt_bytes"] = prompt_bytes(resolved, *rest)
        report["full_prompt_bytes"] = prompt_bytes(Full(), *rest)
    # What a user may wonder about. After a context the prompt itself is kept in full.
    notes = [] if out.tokens[0] else ["the model ended its answer at once"]
    return {**report, "notes": notes + ([] if held else size_notes(policy, length))}


def size_notes(policy: str, length: int) -> list[str]:
    """A note where a policy's budget keeps all `length` tokens of a prompt."""
    size = getattr(parse_policy(policy), "kv_size", 0)
    if not size or length > size:
        return []
    return [f"the prompt has {length} tokens, and kv_size={size} keeps all of them"]


def compress_text(
    path: str,
    text: Path,
    out: Path,
    policy: str,
    dtype: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Reads a text file with the checkpoint at `path` and writes its compressed cache to `out`.

    If the file is there, made by the same call, nothing is read again.

    Args:
        policy: which entries of the cache to keep, such as "headkv:kv_size=512".
        dtype: of weights, activations and cache; None: see `kvjax.hf.default_dtype`.
        chat: True begins a user's message with the text, which questions end; False reads the text
            as it is. None: True where the tokenizer has a chat template.
        system: the system's message before the text.

    Returns:
        tokens, policy, chat, cache_bytes, full_cache_bytes, file_bytes, notes.

    Raises:
        ValueError: an empty or missing text, and see `kvjax.compress`.
    """
    content = read_text(text)
    parse_policy(policy)
    tokenizer = load_tokenizer(path)
    wrapped = in_chat(tokenizer, chat, system)
    ids = document_ids(tokenizer, content, system) if wrapped else prompt_ids(tokenizer, content)
    with stage(f"loading {path}"):
        model, params = load(path, dtype=dtype)
    context = _made(out, model, params, ids, policy, wrapped)
    if context is not None:
        say_finished(out)
    else:
        with stage(f"reading {len(ids):,} tokens"):
            context = compress(model, params, ids, policy, chat=wrapped)
        out.parent.mkdir(parents=True, exist_ok=True)
        context.save(out)
    length, dtype = context.length, params["embedding"].dtype
    return {
        "tokens": length,
        "policy": policy,
        "chat": wrapped,
        "cache_bytes": context.nbytes,
        "full_cache_bytes": prompt_bytes(Full(), model.config, length, dtype),
        "file_bytes": out.stat().st_size,
        "notes": size_notes(policy, length),
    }


def _made(
    out: Path, model: Transformer, params: Any, ids: Sequence[int], policy: str, chat: bool
) -> Context | None:
    """The context in a file that the same call made; None for any other file."""
    (resolved,) = resolve_each([policy], model.config)
    try:
        found = load_context(out, model, params)
    except ValueError:  # no such file, or one of another kind, which the command replaces
        return None
    same = (found.policy, found.chat, found.made_from) == (policy, chat, digest_of(ids, resolved))
    return found if same else None


def calibration_tokens(
    source: str, path: Path, tokens: int, length: int
) -> tuple[Int[np.ndarray, "S T"], Int[np.ndarray, "H T"]]:
    """Sequences to calibrate on [S, T], and held-out sequences [H, T]: every eighth one.

    Args:
        source, path, tokens, length: see `token_rows`.

    Raises:
        ValueError: see `token_rows`; or the file gives a single sequence.
    """
    rows = token_rows(source, path, tokens, length)
    if len(rows) < 2:
        raise ValueError(
            f"{path} gives one sequence of {rows.size} tokens, expected one to hold out"
        )
    # Spread over the file, so that both parts have the same kinds of text.
    held = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        held[-1] = True
    return rows[~held], rows[held]


def token_rows(source: str, path: Path, tokens: int, length: int) -> Int[np.ndarray, "S T"]:
    """Token ids of a file, one sequence a row.

    Args:
        source: the checkpoint whose tokenizer encodes the file.
        path: a text, or an .npy file of token ids [S, T]. Ids are used as they are.
        tokens: most tokens to use; of ids, one sequence is always used.
        length: tokens per sequence, for texts; from 2 to the model's context length.

    Raises:
        ValueError: no such file; ids of another shape or dtype, or outside the vocabulary;
            sequences longer than the model's context; or a text shorter than one sequence.
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
    rows = id_rows(path)
    return rows[: max(1, tokens // max(1, rows.shape[1]))]


def _encode(source: str, path: Path, tokens: int, length: int) -> Int[np.ndarray, "S T"]:
    text = read_text(path)[: MOST_CHARACTERS * tokens]
    ids = np.asarray(prompt_ids(load_tokenizer(source), text), np.int64)[:tokens]
    if len(ids) < length:
        raise ValueError(f"{path} has {len(ids)} tokens, expected at least {length}")
    return ids[: len(ids) // length * length].reshape(-1, length)
