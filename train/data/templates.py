"""Messages as text, in pieces that are learned or not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from train.data.formats import FORMATS, Message


class Piece(NamedTuple):
    """A stretch of a document that is encoded on its own.

    Attributes:
        text: may be empty.
        learned: it is an answer.
    """

    text: str
    learned: bool


def uses_chat_template(form: str, template: str) -> bool:
    """Whether rows of a format go through the tokenizer's chat template."""
    return form == "chat" or (template == "chat" and form != "text")


def prompt_pieces(form: str, messages: Sequence[Message]) -> list[Piece]:
    """One question and its answer in the format's own prompt, or a text alone."""
    if form == "text":
        return [Piece(messages[0].content, True)]
    query, answer = messages
    prompt = FORMATS[form].prompt or "{query}"
    head, tail = prompt.split("{query}")
    # A tokenizer of bytes or words keeps the space between two words with the second.
    text = f"{head}{query.content}{tail}"
    space = " " if text.endswith(" ") else ""
    return [Piece(text.removesuffix(" "), False), Piece(space + answer.content, True)]


def chat_pieces(messages: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """A chat in the tokenizer's template, up to the assistant's last turn.

    What the assistant says is what one more of its turns adds to the rendering of the messages
    before, the start of its turn included: exactly what it would have to write in a chat. A turn
    that opens the chat answers nothing and is not learned.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses the messages, the
            assistant answers nothing, or the template renders earlier messages differently once
            more follow (so that what is learned would not be what is asked for).
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: take a chat model's tokenizer, set "
            "tokenizer.chat_template, or use a format of questions and answers with template='auto'"
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    pieces: list[Piece] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant" or index == 0:
            continue
        before = _render(tokenizer, turns[:index], add_generation_prompt=True)
        after = _render(tokenizer, turns[: index + 1], add_generation_prompt=False)
        for text, learned in ((before, False), (after, True)):
            if not text.startswith(done):
                raise ValueError(_changed(text, done, index + 1))
            pieces.append(Piece(text[len(done) :], learned))
            done = text
    if not pieces:
        raise ValueError("the assistant only speaks first, expected an answer to another turn")
    return pieces


def _changed(text: str, earlier: str, turn: int) -> str:
    same = (a == b for a, b in zip(text, earlier, strict=False))
    at = sum(itertools.takewhile(bool, same))
    return (
        f"up to turn {turn} the chat template renders {text[at : at + 30]!r} where it rendered "
        f"{earlier[at : at + 30]!r} for fewer turns; expected one to begin with the other"
    )


def _render(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, IndexError) as error:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise ValueError(f"the chat template refuses turns {roles}: {error}") from error
