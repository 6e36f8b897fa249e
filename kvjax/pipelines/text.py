"""Text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvjax.generation import generate
from kvjax.hf import load, load_tokenizer


def generate_text(
    path: str,
    prompt: str,
    max_new_tokens: int,
    policy: str = "full",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    dtype: str = "float32",
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continues `prompt` with the checkpoint at `path`.

    Args:
        write: called with pieces of the new text as they are ready.

    Returns:
        prompt, text, prompt_tokens, new_tokens, policy, cache_bytes, full_cache_bytes.

    Raises:
        ValueError: see `kvjax.load` and `kvjax.generate`.
    """
    if not prompt:
        raise ValueError("the prompt is empty, expected text")
    tokenizer = load_tokenizer(path)
    model, params = load(path, dtype=dtype)
    ids = tokenizer(prompt)["input_ids"]
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
        max_new_tokens=max_new_tokens,
        policy=policy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        on_tokens=show,
    )
    text = tokenizer.decode(out.tokens[0], skip_special_tokens=True)
    if write is not None:
        write(text[len(printed) :])
    return {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": len(ids),
        "new_tokens": len(out.tokens[0]),
        "policy": policy,
        "cache_bytes": out.cache_bytes,
        "full_cache_bytes": out.full_cache_bytes,
    }
