"""Questions about a page of text, answered from the full cache and from caches of 5 % of its bytes.

The page and the questions are the project's own. The questions are three of seven, chosen because
SmolLM2-135M answers them from the full cache; docs/demo.md says what became of the others.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table

from kvjax.chat import end_ids
from kvjax.commands.demo.shared import POLICIES, Steps, Subject, open_table
from kvjax.generation import generate, generate_each
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import resolve
from kvjax.policies.policy import Full, Policy
from kvjax.prefilling import prompt_bytes
from kvjax.tasks.prompt import SENTENCE_END
from kvjax.text import added_text

TEXT = Path(__file__).with_name("marrow_bay.txt")
SHARE = 0.05  # of the bytes of the full cache
RATIO = 0.048  # of the prompt's tokens: pools end at whole blocks of rows, a little more
NEW_TOKENS = 16
TIMED_TOKENS = 32
"""Tokens of a timed answer, which does not stop at its end."""


@dataclass(frozen=True)
class Question:
    """A question about the page, the beginning of its answer, and the right answer after it."""

    text: str
    begins: str
    answer: str


QUESTIONS = (
    Question(
        "What is the number that opens the safe of the town hall?",
        "The number that opens the safe of the town hall is",
        "7405183",
    ),
    Question(
        "What was the password of the watchmen?",
        "The password of the watchmen was",
        "seven grey geese over the mill",
    ),
    Question(
        "What is the name of the ship that broke on the rocks in 1836?",
        "The ship that broke on the rocks in 1836 was called the",
        "Corvina",
    ),
)


@dataclass(frozen=True)
class Answer:
    """What the model writes after the beginning of an answer.

    Attributes:
        text: up to the end of the first sentence.
        right: whether it has the right answer in it.
    """

    question: str
    policy: str
    text: str
    right: bool


@dataclass(frozen=True)
class Cost:
    """What a cache costs on the first question.

    Attributes:
        cache_bytes: after the prompt, without room for new tokens.
        first_token: seconds from the prompt to the first token, nothing compiled.
        tokens_per_second: of the tokens after the first one.
    """

    policy: str
    cache_bytes: int
    first_token: float
    tokens_per_second: float


def chapters() -> list[str]:
    """The texts of the chapters of TEXT, without their titles. The first one is the page."""
    parts = re.split(r"^# .*\n", TEXT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [part.strip() for part in parts[1:]]


def prompts(subject: Subject) -> list[list[int]]:
    """The ids of the prompt of each question, with the page before it."""
    page, found = chapters()[0], []
    for question in QUESTIONS:
        before, after = subject.vocab.around(page, f"\n\n{question.text}", question.begins)
        found.append(before + after)
    return found


def caches(subject: Subject, scores: HeadScores) -> dict[str, Policy]:
    """The full cache, and each policy at RATIO."""
    config = subject.model.config
    small = {name: resolve(f"{name}:ratio={RATIO}", config, scores) for name in POLICIES}
    return {"full": Full(), **small}


def answer_questions(
    subject: Subject, policies: Mapping[str, Policy], ids: Sequence[Sequence[int]], steps: Steps
) -> list[Answer]:
    """Every question's answers, one for each policy. A prompt is read once for all of them.

    Args:
        ids: from `prompts`.
    """
    model, tokenizer, found = subject.model, subject.tokenizer, []
    ends = ends_of(subject)
    text = f"compile, then {len(ids)} questions to {len(policies)} caches"
    with steps.step(text, len(ids)) as at:
        for number, (question, prompt) in enumerate(zip(QUESTIONS, ids, strict=True), 1):
            results = generate_each(
                model,
                subject.params,
                [prompt],
                list(policies.values()),
                NEW_TOKENS,
                eos_ids=ends,
            )
            for name, result in zip(policies, results, strict=True):
                written = first_sentence(added_text(tokenizer, prompt, result.tokens[0]))
                right = holds(written, question.answer)
                found.append(Answer(question.text, name, written, right))
            at(number)
    return found


def ends_of(subject: Subject) -> tuple[int, ...]:
    """The ids that end an answer."""
    return end_ids(subject.tokenizer, subject.model.config, chat=subject.vocab.chat)


def first_sentence(text: str) -> str:
    """The first sentence of the new text, or its first line if that is shorter."""
    line = text.strip().partition("\n")[0]
    return SENTENCE_END.split(line)[0]


def holds(text: str, answer: str) -> bool:
    """Whether a text has the answer in it, as whole words."""
    return re.search(rf"\b{re.escape(answer)}\b", text, re.IGNORECASE) is not None


def costs(
    subject: Subject, policies: Mapping[str, Policy], ids: Sequence[int], steps: Steps
) -> list[Cost]:
    """Bytes and times of every cache on one prompt, whose programs are compiled already."""
    config, dtype, found = subject.model.config, subject.params["embedding"].dtype, []
    with steps.step("the first question again, for the times", len(policies)) as at:
        for number, (name, policy) in enumerate(policies.items(), 1):
            held = prompt_bytes(policy, config, len(ids), dtype)
            found.append(Cost(name, held, *speed(subject, policy, ids)))
            at(number)
    return found


def speed(subject: Subject, policy: Policy, ids: Sequence[int]) -> tuple[float, float]:
    """Seconds to the first token, and the later tokens of a second."""
    # No token has this id. There are as many ends as in answering, whose programs serve here too.
    vocab_size = subject.model.config.vocab_size
    ends = [vocab_size] * len(ends_of(subject))
    times = [time.perf_counter()]
    generate(
        subject.model,
        subject.params,
        [ids],
        TIMED_TOKENS,
        policy,
        eos_ids=ends,
        on_tokens=lambda *_: times.append(time.perf_counter()),
    )
    first, *rest = np.diff(times).tolist()
    return first, len(rest) / sum(rest)


def show_answers(answers: Sequence[Answer], held: Mapping[str, int], console: Console) -> None:
    """Prints each question with its answers.

    Args:
        held: cache bytes by policy.
    """
    for number, question in enumerate(QUESTIONS, 1):
        console.print(f"\n{number}. {question.text}", markup=False)
        console.print(f"   {question.begins} …", markup=False)
        text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        table = Table.grid("", Column(justify="right"), text, "", padding=(0, 1), expand=True)
        for answer in (a for a in answers if a.question == question.text):
            verdict = "right" if answer.right else "wrong"
            size = f"{held[answer.policy] / 2**20:.1f} MiB"
            table.add_row(answer.policy, size, f"… {answer.text}", verdict)
        console.print(Padding(table, (0, 0, 0, 5)))


def cost_table(answers: Sequence[Answer], found: Sequence[Cost]) -> Table:
    """Bytes, right answers and times of every cache."""
    table = open_table("cache", ("MiB", "of full", "right answers", "first token", "tokens/s"))
    for cost in found:
        own = [answer.right for answer in answers if answer.policy == cost.policy]
        table.add_row(
            cost.policy,
            f"{cost.cache_bytes / 2**20:.1f}",
            f"{cost.cache_bytes / found[0].cache_bytes:.1%}",
            f"{sum(own)} of {len(own)}",
            f"{cost.first_token:.1f} s",
            f"{cost.tokens_per_second:.1f}",
        )
    return table


def as_rows(answers: Sequence[Answer], found: Sequence[Cost]) -> dict[str, list[dict[str, Any]]]:
    """Answers and costs for report.json."""
    return {
        "answers": [dataclasses.asdict(answer) for answer in answers],
        "caches": [dataclasses.asdict(cost) for cost in found],
    }
