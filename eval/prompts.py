"""Prompts as token ids: raw or in the chat template, cut to the context, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.task import Item, Task
from kvjax.chat import chat_ids
from kvjax.config import ModelConfig
from kvjax.prefilling import bucket_length
from kvjax.text import prompt_ids


@dataclass(frozen=True)
class Prompt:
    """The prompt of one item, as token ids.

    Attributes:
        index: of the item in its task.
        ids: the tokens that the model reads.
        length: number of tokens before the prompt was cut.
        chat: whether the prompt is inside the chat template, which decides what ends the answer.
    """

    index: int
    ids: tuple[int, ...]
    length: int
    chat: bool = False

    @property
    def truncated(self) -> bool:
        """Whether the prompt was cut."""
        return len(self.ids) < self.length


def encode(
    task: Task, tokenizer: Any, config: ModelConfig, chat: bool, max_length: int | None = None
) -> list[Prompt]:
    """The prompts of all items.

    Args:
        chat: put prompts inside the tokenizer's chat template, except for tasks, or items (meta
            "chat"), that say no. Items that are token ids are in it already.
        max_length: tokens of prompt and answer, where it is less than the model's context.

    Raises:
        ValueError: no chat template, no room for a prompt before the answer, or a prompt that is
            too long for a task that refuses to cut it.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model's tokenizer has no chat template: run without --chat")
    whole = min(config.context_length, config.context_length if max_length is None else max_length)
    prompts = []
    for index, item in enumerate(task.items):
        # The answer must fit into the context after the prompt.
        room = whole - item.max_new_tokens
        if room < 2:
            raise ValueError(
                f"item {item.id} wants {item.max_new_tokens} new tokens of {whole} in all, "
                "expected room for a prompt"
            )
        within = bool(chat and task.chat and item.meta.get("chat", True))
        if not isinstance(item.prompt, str):
            _check_ids(item, within)
        make = _in_template if within and isinstance(item.prompt, str) else _raw
        try:
            ids, length = make(item, tokenizer, room, task.truncate)
        except TooLong as error:
            raise ValueError(
                f"item {item.id} has {error.length} tokens, expected at most {room}: a context of "
                f"{whole} without {item.max_new_tokens} for the answer; --lengths asks for shorter "
                "prompts"
            ) from None
        if not ids:
            raise ValueError(f"item {item.id} has an empty prompt")
        prompts.append(Prompt(index, tuple(ids), length, within))
    return prompts


def _check_ids(item: Item, within: bool) -> None:
    """Raises ValueError where the ids of a prompt were not made for this form."""
    made = item.meta.get("chat") is True
    if made != within:
        raise ValueError(
            f"item {item.id} is token ids {'inside' if made else 'outside'} the chat template, "
            f"expected a task that was loaded with chat={within}"
        )


class TooLong(Exception):
    """A prompt that must not be cut has `length` tokens."""

    def __init__(self, length: int):
        super().__init__(length)
        self.length = length


def cut(ids: Sequence[int], room: int, rule: str, keep: int = 0) -> list[int]:
    """At most `room` of the ids.

    Args:
        rule: "middle" keeps both ends, as LongBench does (arXiv 2308.14508); "left" keeps the end.
        keep: number of ids at the start that "left" keeps too (the beginning-of-sequence token).

    Raises:
        TooLong: the rule is "refuse".
    """
    if len(ids) <= room:
        return list(ids)
    if rule == "refuse":
        raise TooLong(len(ids))
    # An odd token goes to the end, where the question is.
    head = room // 2 if rule == "middle" else keep
    return [*ids[:head], *ids[len(ids) - (room - head) :]]


def _raw(item: Item, tokenizer: Any, room: int, rule: str) -> tuple[list[int], int]:
    """The ids of a raw prompt, and how many there were before the cut."""
    prompt = item.prompt
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    # A prompt that is cut on the left keeps its BOS, which models expect first.
    starts = bool(ids) and ids[0] == getattr(tokenizer, "bos_token_id", None)
    return cut(ids, room, rule, int(starts)), len(ids)


def _in_template(item: Item, tokenizer: Any, room: int, rule: str) -> tuple[list[int], int]:
    """As `_raw`, for a prompt inside the chat template. Only the text inside it is cut."""
    text = str(item.prompt)
    ids = chat_ids(tokenizer, text)
    length = len(ids)
    if length <= room:
        return ids, length
    if rule == "refuse":
        raise TooLong(length)
    # The template's own tokens are what the whole has beyond the text.
    inner = tokenizer.encode(text, add_special_tokens=False)
    kept = room - (length - len(inner))
    # Cutting and encoding again can add a few tokens, so the text is cut until the prompt fits.
    while kept > 0:
        ids = chat_ids(tokenizer, tokenizer.decode(cut(inner, kept, rule)))
        if len(ids) <= room:
            return ids, length
        kept -= len(ids) - room
    raise TooLong(length)


@dataclass(frozen=True)
class Shape:
    """The shape that programs are compiled for.

    Attributes:
        bucket: prompt tokens, padding included.
        max_new_tokens: longest answer.
        batch: number of sequences.
    """

    bucket: int
    max_new_tokens: int
    batch: int


@dataclass(frozen=True)
class PromptBatch:
    """At most `shape.batch` prompts of one shape and one form, which are read together.

    Attributes:
        seed: of the random numbers of sampled answers.
    """

    shape: Shape
    prompts: tuple[Prompt, ...]
    seed: int

    @property
    def chat(self) -> bool:
        """Whether the prompts are inside the chat template."""
        return self.prompts[0].chat

    @property
    def rows(self) -> list[list[int]]:
        """Ids of `shape.batch` prompts; the first prompt fills a batch that has fewer."""
        missing = self.shape.batch - len(self.prompts)
        return [list(prompt.ids) for prompt in (*self.prompts, *self.prompts[:1] * missing)]


def make_batches(
    prompts: Sequence[Prompt], items: Sequence[Item], batch_size: int, seed: int = 0
) -> list[PromptBatch]:
    """Batches of one bucket, longest answer and form (raw or chat), the largest bucket first.

    Batches do not depend on which prompts are answered already. A bucket with fewer prompts than
    `batch_size` has one batch of that many, so every shape is compiled once. The largest come first
    so that a lack of memory shows at the start.

    Raises:
        ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected ≥ 1")
    by_shape: dict[tuple[int, int, bool], list[Prompt]] = {}
    # Sorting by length puts prompts of similar length into one batch.
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index)):
        new = items[prompt.index].max_new_tokens
        key = bucket_length(len(prompt.ids)), new, prompt.chat
        by_shape.setdefault(key, []).append(prompt)
    batches: list[PromptBatch] = []
    for (bucket, new, _), members in sorted(by_shape.items(), reverse=True):
        size = min(batch_size, len(members))
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            # Every batch has a seed, so an interrupted run draws what an uninterrupted run draws.
            drawn = np.random.SeedSequence([seed, len(batches)]).generate_state(1)
            batches.append(PromptBatch(Shape(bucket, new, size), part, int(drawn[0] >> 1)))
    return batches


def shapes(batches: Iterable[PromptBatch]) -> dict[Shape, list[Prompt]]:
    """The prompts of each shape."""
    found: dict[Shape, list[Prompt]] = {}
    for batch in batches:
        found.setdefault(batch.shape, []).extend(batch.prompts)
    return found
