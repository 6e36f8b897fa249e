"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.context import compress, load_context
from kvjax.encoding import end_ids, ids_after, prompt_ids
from kvjax.generation import generate
from kvjax.hf import load, load_tokenizer
from kvjax.mesh import named_mesh
from kvjax.policies.named import parse_policy
from kvjax.text import TextStream


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
        parse_policy(policy)  # a policy that cannot be had is refused before a model is read
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
    parse_policy(policy)
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
