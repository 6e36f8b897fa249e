"""Texts that end an answer, such as the next question. What follows is not the answer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvjax.text import StoppingStream, TextStream


def ends_at_stops(
    tokenizer: Any, prompts: Sequence[Sequence[int]], stops: Sequence[str]
) -> Callable[[int, int, list[int]], bool]:
    """The `on_tokens` of `kvjax.generation.generate_each`: True once an answer has a whole stop.

    Without it a batch would be decoded to the longest answer, though its programs or answers to
    few-shot prompts have long been followed by others that nobody reads.

    Args:
        prompts: token ids. Rows after them fill a batch, and end at once.
    """
    streams: dict[tuple[int, int], StoppingStream] = {}

    def on_tokens(policy: int, row: int, new: list[int]) -> bool:
        if row >= len(prompts):
            return True
        if not stops:
            return False
        if (policy, row) not in streams:
            streams[policy, row] = StoppingStream(TextStream(tokenizer, prompts[row]), stops)
        streams[policy, row].add(new)
        return streams[policy, row].stopped

    return on_tokens
