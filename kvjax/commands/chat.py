"""`kvjax chat`: a chat in the terminal, over one compressed cache."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvjax.chat import document_ids, has_chat_template
from kvjax.context import compress, load_context
from kvjax.conversation import Conversation, ask
from kvjax.endings import say
from kvjax.hf import load, load_tokenizer
from kvjax.policies.named import parse_policy
from kvjax.progress import stage
from kvjax.text_files import read_text

PROMPT = "> "


def chat(
    path: str,
    policy: str,
    context: Path | None = None,
    document: Path | None = None,
    system: str | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Answers the lines of standard input, each a message of one chat, until it ends.

    Args:
        path: a checkpoint whose tokenizer has a chat template.
        policy: what the cache keeps, see `kvjax.conversation.ask`.
        context: a file of `kvjax compress`, which the chat is about. It has a policy already, and
            `policy`, `document` and `system` do not apply.
        document: a text file that the chat is about.
        system: the system's message.
        dtype: see `kvjax.load`.
        settings: of `kvjax.conversation.ask`.

    Returns:
        For each message: message, answer, new_tokens, cache_bytes, full_cache_bytes,
        seconds_to_first_token and tokens_per_second.

    Raises:
        ValueError: no chat template, and see `kvjax.conversation.ask`.
    """
    parse_policy(policy)
    content = None if document is None else read_text(document)
    tokenizer = load_tokenizer(path)
    if not has_chat_template(tokenizer):
        raise ValueError("this model's tokenizer has no chat template: use `kvjax generate`")
    with stage(f"loading {path}"):
        model, params = load(path, dtype=dtype)
    state = Conversation()
    if context is not None:
        held = load_context(context, model, params)
        state = Conversation.after(held)
    if content is not None:
        ids = document_ids(tokenizer, content, system)
        with stage(f"reading {len(ids):,} tokens"):
            state = Conversation.after(compress(model, params, ids, policy, chat=True))
    rows = []
    for message in _messages():
        clock = Clock(lambda piece: print(piece, end="", flush=True))
        settings |= {"policy": policy, "system": system, "on_text": clock.on_text}
        state, out = ask(model, params, tokenizer, state, message, **settings)
        print()
        rows.append({"message": message, "answer": out.text, **clock.facts(len(out.tokens[0]))})
        rows[-1] |= {"cache_bytes": out.cache_bytes, "full_cache_bytes": out.full_cache_bytes}
        say(summary(rows[-1]))
    return rows


def _messages() -> Iterator[str]:
    """The lines of standard input that are not empty; a terminal shows a prompt."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines and has a history
    while True:
        try:
            line = input(PROMPT if terminal else "").strip()
        except EOFError:
            return
        if line:
            yield line


class Clock:
    """Times the pieces of an answer, from its creation on."""

    def __init__(self, write: Callable[[str], None]):
        self._write, self._start = write, time.monotonic()
        self._first: float | None = None

    def on_text(self, _: int, piece: str) -> None:
        """Puts out a piece of text, see `kvjax.text_generation.OnText`."""
        if self._first is None:
            self._first = time.monotonic()
        self._write(piece)

    def facts(self, tokens: int) -> dict[str, Any]:
        """new_tokens, seconds_to_first_token, and tokens_per_second after the first one."""
        end = time.monotonic()
        first = end if self._first is None else self._first
        rate = (tokens - 1) / (end - first) if tokens > 1 and end > first else 0.0
        waited = round(first - self._start, 3)
        return {
            "new_tokens": tokens,
            "seconds_to_first_token": waited,
            "tokens_per_second": round(rate, 1),
        }


def summary(row: dict[str, Any]) -> str:
    """The line under an answer."""
    cache, full = row["cache_bytes"], row["full_cache_bytes"]
    return (
        f"[cache {cache:,} bytes, {cache / full:.0%} of {full:,}; first token after "
        f"{row['seconds_to_first_token']:.2f} s; {row['tokens_per_second']:.0f} tokens/s]"
    )
