"""The columns of published data sets, read as messages: who says what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: Let's think step by step."
)
"""MetaMath's prompt (Yu et al. 2023, "MetaMath"); the answer follows at once."""

STARCODER2 = "### Instruction\n{query}\n\n### Response\n"
"""Self-OSS-Instruct's prompt (StarCoder2-Instruct, Wei et al. 2024)."""

THINK_FIRST = "Let's think step by step."

ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of the roles."""


@dataclass(frozen=True)
class Message:
    """One turn: "user", "assistant", "system", …; "text" is a text without turns.

    Only text is kept of a turn: calls of tools that stand beside it are not rendered.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Format:
    """How rows are read.

    Attributes:
        columns: the sets of columns it can read, any one of which is enough.
        read: from a row that has them.
        prompt: what stands around the query, for formats with one question and one answer.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Row], list[Message]]
    prompt: str | None = None


def read_messages(name: str, row: Row) -> list[Message]:
    """The messages of a row in format `name`.

    Raises:
        ValueError: columns that the format does not know, a value of another type than expected,
            or nothing to learn: no assistant's turn, an empty answer, an empty text.
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
    if answer.strip() and not mark:
        raise ValueError(f"got an answer ending {answer[-20:]!r}, expected a line '#### N'")
    return _ask(_text(row, "question"), _conclude(reasoning, number) if mark else "")


def _gsm8k_backward(row: Row) -> list[Message]:
    """MetaMath's backward questions: some rows have the answer as it is trained on ("output"),
    the others the reasoning and the number apart."""
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
"""By name. `plain` puts one space between question and answer and nothing else."""
