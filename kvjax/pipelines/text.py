"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.context import compress, load_context
from kvjax.generation import generate
from kvjax.headkv import Policy
from kvjax.hf import load, load_tokenizer
from kvjax.mesh import named_mesh


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
        context: a file that `compress_text` wrote; the prompt goes on from it.
        settings: of `kvjax.generate`.

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
    ids = tokenizer(prompt, add_special_tokens=held is None)["input_ids"]
    printed, new_ids = "", []

    def show(_: int, ids: list[int]) -> None:
        # Decoding all ids each time keeps characters that span several tokens whole.
        nonlocal printed
        new_ids.extend(ids)
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        if write is not None and not text.endswith("\ufffd"):
            write(text[len(printed) :])
            printed = text

    out = generate(
        model,
        params,
        [ids],
        policy=policy,
        on_tokens=show,
        context=held,
        **settings,
    )
    text = tokenizer.decode(out.tokens[0], skip_special_tokens=True)
    if write is not None:
        write(text[len(printed) :])
    return {
        "prompt": prompt,
        "text": text,
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
    model, params = load(path, dtype=dtype)
    ids = load_tokenizer(path)(text.read_text(encoding="utf-8"))["input_ids"]
    context = compress(model, params, ids, policy)
    out.parent.mkdir(parents=True, exist_ok=True)
    context.save(out)
    return {
        "tokens": context.length,
        "policy": policy,
        "cache_bytes": context.nbytes,
        "file_bytes": out.stat().st_size,
    }
