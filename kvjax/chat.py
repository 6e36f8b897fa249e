"""Chat templates: ids of messages, of long texts in messages, and the ids that end an answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvjax.config import ModelConfig
from kvjax.text import encode, ids_after, prompt_ids

MARK = "@here@"
"""Stands in a chat template for a text whose place is asked for."""

TEMPLATE = {"enable_thinking": False}
"""Variables of the chat template: answers are short, so models that can think aloud do not."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_ids(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """Ids of a user's message in the chat template, up to the place where the answer begins.

    Models that can think aloud are asked not to.

    Args:
        tokenizer: of transformers, with a chat template.
        text: the user's message.
        system: the system's message before it; None for the template's own, if any.

    Raises:
        ValueError: the template refuses the messages, as some do with a system's.
    """
    return encode(tokenizer, _in_template(tokenizer, _turns(text, system)))


def document_ids(tokenizer: Any, text: str, system: str | None = None) -> list[int]:
    """Ids of a long text at the beginning of a user's message, up to the end of the text.

    Questions follow it later, see `turn_ids`.

    Args:
        tokenizer, system: see `chat_ids`.

    Raises:
        ValueError: the template refuses the messages or changes the text.
    """
    head, _ = _around_mark(_in_template(tokenizer, _turns(text + MARK, system)))
    return encode(tokenizer, head)


class Turn(NamedTuple):
    """Ids that a user's message adds to a chat.

    Attributes:
        message: from the end of the text so far to the end of the message.
        opening: from there to the place where the answer begins.
    """

    message: list[int]
    opening: list[int]


def turn_ids(
    tokenizer: Any,
    message: str,
    answered: int = 0,
    document: bool = False,
    system: str | None = None,
) -> Turn:
    """Ids of the next message of a chat.

    Args:
        answered: messages before this one; the text so far ends with the last answer, without what
            ends a turn.
        document: the chat began with `document_ids`, and `system` in it. A first message continues
            the document's turn, after an empty line.
        system: the system's message before the first one.

    Raises:
        ValueError: the template refuses the messages or changes them.
    """
    asked = f"{MARK}\n\n{message}{MARK}" if document and not answered else f"{message}{MARK}"
    turns = _turns("x" if answered else asked, system)
    # What the earlier messages said does not matter: the text before the last answer is cut off.
    for number in range(answered):
        last = number == answered - 1
        turns.append({"role": "assistant", "content": f"x{MARK}" if last else "x"})
        turns.append({"role": "user", "content": asked if last else "x"})
    text, opening = _around_mark(_in_template(tokenizer, turns))
    if not (answered or document):
        return Turn(encode(tokenizer, text), ids_after(tokenizer, opening))
    _, text = _around_mark(text)
    return Turn(ids_after(tokenizer, text), ids_after(tokenizer, opening))


def ids_around(
    tokenizer: Any, before: str, after: str, answer_prefix: str = "", chat: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a prompt before and after a long text that is put together as ids.

    The prompt is `before`, the long text, `after`, and the beginning of the answer. Raw, a space
    separates the beginning of the answer from `after`. In the chat template the three texts are a
    user's message, and the answer's beginning stands in the assistant's turn.

    Args:
        tokenizer: of transformers.
        after: usually the question, with the line end before it.
        answer_prefix: the beginning of the answer, without space at its ends; "" for none.

    Raises:
        ValueError: `chat` without a chat template, or one that refuses or changes the message.
    """
    if not chat:
        asked = " ".join(filter(None, (after, answer_prefix)))
        return prompt_ids(tokenizer, before), ids_after(tokenizer, asked)
    if not has_chat_template(tokenizer):
        raise ValueError("this model's tokenizer has no chat template, expected a raw prompt")
    head, tail = _around_mark(_in_template(tokenizer, _turns(f"{before}{MARK}{after}")))
    return encode(tokenizer, head), ids_after(tokenizer, tail + answer_prefix)


def _turns(text: str, system: str | None = None) -> list[dict[str, str]]:
    """A user's first message, after the system's."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": text}]


def _around_mark(text: str) -> tuple[str, str]:
    """The text before and after the last MARK."""
    head, mark, tail = text.rpartition(MARK)
    if not mark:
        raise ValueError(
            "the chat template changes the user's message, expected it unchanged: use the raw text "
            "(chat=False, --raw)"
        )
    return head, tail


def _in_template(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """The messages in the chat template, up to the place where the answer begins."""
    from jinja2 import TemplateError

    settings = {"tokenize": False, "add_generation_prompt": True, **TEMPLATE}
    try:
        return tokenizer.apply_chat_template(turns, **settings)
    except (TemplateError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None


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
    if not has_chat_template(tokenizer):
        return []
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE)
    except (TemplateError, TypeError, ValueError, IndexError):
        return []
    _, answer, after = text.rpartition(MARK)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = encode(tokenizer, after) if answer else []
    return [index for index in ids if index in special][:1]
