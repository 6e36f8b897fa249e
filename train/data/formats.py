"""Rows of published data sets as messages, and messages as pieces of text.

A format knows the columns of a data set and the prompt that its model was trained with.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Row = Mapping[str, Any]


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
"""MetaMath's prompt (Yu et al. 2023, "MetaMath"); the answer follows without a space."""


STARCODER2 = "### Instruction\n{query}\n\n### Response\n"
"""Self-OSS-Instruct's prompt (StarCoder2-Instruct, Wei et al. 2024)."""


THINK_FIRST = "Let's think step by step."


ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of ShareGPT → names of chat templates."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat. Only its text is kept: calls of tools are not rendered.

    Attributes:
        role: "user", "assistant", "system", …; "text" for a text without turns.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Format:
    """How the rows of a data set are read.

    Attributes:
        columns: sets of columns; a row must have all columns of one set.
        read: makes messages from such a row.
        prompt: text with "{query}", for formats with one question and one answer.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row], list[Message]]
    prompt: str | None = None


def read_messages(name: str, row: Row) -> list[Message]:
    """The messages of a row in format `name`.

    Raises:
        ValueError: missing columns, a value of the wrong type, or nothing to learn: no turn of the
            assistant, an empty answer, an empty text.
    """
    form = FORMATS[name]
    if not any(row.keys() >= set(columns) for columns in form.columns):
        expected = " or ".join(", ".join(columns) for columns in form.columns)
        raise ValueError(
            f"got columns {', '.join(map(str, row)) or 'none'}; format {name!r} expects {expected}"
        )
    messages = form.read(row)
    if not any(m.role in ("assistant", "text") and m.content.strip() for m in messages):
        roles = ", ".join(message.role for message in messages) or "none"
        raise ValueError(f"no answer to learn (turns: {roles}), expected text in one")
    return messages


def _text(row: Row, column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type(value).__name__}, expected text")
    return value


def _ask(query: str, answer: str) -> list[Message]:
    return [Message("user", query), Message("assistant", answer)]


def _columns(query: str, answer: str) -> Callable[[Row], list[Message]]:
    return lambda row: _ask(_text(row, query), _text(row, answer))


def _gsm8k(row: Row) -> list[Message]:
    """GSM8K without its calculator annotations, ending as MetaMathQA's answers do."""
    answer = _text(row, "answer")
    reasoning, mark, number = re.sub(r"<<.*?>>", "", answer).rpartition("####")
    # An empty answer is reported by `read_messages`, as for all formats.
    if answer.strip() and not mark:
        raise ValueError(f"got an answer ending {answer[-20:]!r}, expected a line '#### N'")
    return _ask(_text(row, "question"), _conclude(reasoning, number) if mark else "")


def _gsm8k_backward(row: Row) -> list[Message]:
    """MetaMath's backward questions.

    Some rows have the whole answer ("output"), the others have the reasoning and the number in two
    columns.
    """
    if "output" in row:
        answer = _text(row, "output").strip()
    else:
        reasoning = _text(row, "inv_question_pred_answer").strip().removeprefix(THINK_FIRST)
        answer = _conclude(reasoning, _text(row, "answer")) if reasoning else ""
    return _ask(_text(row, "question"), answer)


def _conclude(reasoning: str, number: str) -> str:
    number = number.strip()
    return f"{reasoning.strip()}\n#### {number}\nThe answer is: {number}"


def _mbpp(row: Row) -> list[Message]:
    code = _text(row, "code").replace("\r\n", "\n").strip()
    return _ask(_text(row, "text"), f"```python\n{code}\n```" if code else "")


def _chat(row: Row) -> list[Message]:
    column, role, content = ("messages", "role", "content")
    if column not in row:
        column, role, content = ("conversations", "from", "value")
    turns = row[column]
    if not isinstance(turns, list):
        raise ValueError(f"{column!r} is {type(turns).__name__}, expected a list of turns")
    return [_turn(turn, f"{column}[{i}]", role, content) for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str, role: str, content: str) -> Message:
    if not isinstance(turn, Mapping) or not turn.keys() >= {role, content}:
        got = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise ValueError(f"{where}: got {got}; expected {role}, {content}")
    try:
        text, name = _text(turn, content), _text(turn, role)
        thoughts = [_text(turn, key) for key in ("reasoning_content", "thinking") if key in turn]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    # Chat templates expect reasoning inside of <think>, where it is a separate field of the turn.
    thought = next(filter(None, thoughts), "")
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    return Message(ROLES.get(name, name), text)


FORMATS: dict[str, Format] = {
    "metamath": Format((("query", "response"),), _columns("query", "response"), ALPACA),
    "sc2": Format((("instruction", "response"),), _columns("instruction", "response"), STARCODER2),
    "chat": Format((("messages",), ("conversations",)), _chat),
    "text": Format((("text",),), lambda row: [Message("text", _text(row, "text"))]),
    "gsm8k": Format((("question", "answer"),), _gsm8k, ALPACA),
    "gsm8k_backward": Format(
        (("question", "output"), ("question", "inv_question_pred_answer", "answer")),
        _gsm8k_backward,
        ALPACA,
    ),
    "mbpp": Format((("text", "code"),), _mbpp, STARCODER2),
    "plain": Format((("query", "response"),), _columns("query", "response"), "{query} "),
}
"""Formats by name. `plain` puts one space between question and answer and adds nothing else."""


class Piece(NamedTuple):
    """A part of a document that is encoded separately.

    Attributes:
        text: may be empty.
        learned: True for an answer.
    """

    text: str
    learned: bool


def uses_chat_template(form: str, template: str) -> bool:
    """Whether rows of a format are put into the tokenizer's chat template."""
    return form == "chat" or (template == "chat" and form != "text")


def prompt_pieces(form: str, messages: Sequence[Message]) -> list[Piece]:
    """One question and its answer in the prompt of the format; or a text alone."""
    if form == "text":
        return [Piece(messages[0].content, True)]
    query, answer = messages
    prompt = FORMATS[form].prompt or "{query}"
    head, tail = prompt.split("{query}")
    # Tokenizers attach the space between two words to the second: move it to the answer.
    text = f"{head}{query.content}{tail}"
    space = " " if text.endswith(" ") else ""
    return [Piece(text.removesuffix(" "), False), Piece(space + answer.content, True)]


def chat_pieces(messages: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """A chat in the tokenizer's template, up to the assistant's last turn.

    The learned piece of a turn is the text that the turn adds to the rendering of the messages
    before it and of the start of the turn: exactly the text that the model has to write in a chat.
    A first turn of the assistant answers nothing and is not learned.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses the messages, the
            assistant answers nothing, or the template renders earlier messages differently when
            more messages follow (training would then differ from generation).
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
        # Two renderings: up to the point where the assistant begins, and up to its turn's end.
        before = _render(tokenizer, turns[:index], add_generation_prompt=True)
        after = _render(tokenizer, turns[: index + 1], add_generation_prompt=False)
        for text, learned in ((before, False), (after, True)):
            # Some templates drop the reasoning of earlier turns once more turns follow.
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
