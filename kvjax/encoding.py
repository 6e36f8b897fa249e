"""Token ids of texts: of a prompt, of a text that follows another, and of what ends an answer."""

from __future__ import annotations

from typing import Any

from kvjax.config import ModelConfig

ANCHORS = ("\n", "a", ".", "☺")
"""Texts to encode another text after: a tokenizer rarely merges all of them with what follows."""

MARK = "@answer@"

TEMPLATE = {"enable_thinking": False}
"""Variables of the chat template: answers are short, so models that can think aloud do not."""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that begins a sequence and will be continued.

    The special tokens that the tokenizer puts before a text (BOS) come once: a text that begins
    with them gets no second ones. What the tokenizer puts after a text (EOS) is left out.

    Args:
        tokenizer: of transformers.
    """
    ids, start = _encode(tokenizer, text), _start(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def ids_after(tokenizer: Any, text: str, before: str = "") -> list[int]:
    """Ids of a text that follows another one, without special tokens of the tokenizer's own.

    Sentencepiece tokenizers put a space before any text that they encode. Here this would be a
    space that the text does not have, so the text is encoded together with one before it.

    Args:
        tokenizer: of transformers.
        before: the text that it follows; empty where that is not known.
    """
    alone = _encode(tokenizer, text)
    for anchor in filter(None, (before, *ANCHORS)):
        head = _encode(tokenizer, anchor)
        written = _written(tokenizer, head, alone)
        if written == text:
            return alone
        whole = _encode(tokenizer, anchor + text)
        rest = whole[len(head) :]
        # A made-up text before this one counts only where it saves the space and nothing else.
        saves = anchor == before or f" {_written(tokenizer, head, rest)}" == written
        if rest and whole == head + rest and saves:
            return rest
    return alone


def end_ids(tokenizer: Any, config: ModelConfig, chat: bool) -> tuple[int, ...]:
    """All ids that end an answer: the model's, the tokenizer's, and the end of a chat turn.

    Args:
        chat: whether the end of a turn counts, where the tokenizer has a chat template.
    """
    found = [*config.eos_ids]
    if getattr(tokenizer, "eos_token_id", None) is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found + (_turn_end(tokenizer) if chat else [])))


def _turn_end(tokenizer: Any) -> list[int]:
    """The first special token after an answer in the chat template, where there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE)
    except (TemplateError, TypeError, ValueError, IndexError):
        return []
    _, answer, after = text.rpartition(MARK)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = _encode(tokenizer, after) if answer else []
    return [index for index in ids if index in special][:1]


def _start(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    plain, whole = _encode(tokenizer, "a"), list(tokenizer.encode("a"))
    if not plain:
        # No token for "a", so nothing separates what comes before from what comes after.
        return [index for index in whole[:1] if index == tokenizer.bos_token_id]
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:at] for at in places if whole[at : at + len(plain)] == plain), [])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []


def _written(tokenizer: Any, head: list[int], ids: list[int]) -> str:
    """The text that `ids` add after `head`, special tokens written out."""
    before, text = (
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (head, head + ids)
    )
    return text[len(before) :]
