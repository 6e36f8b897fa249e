"""What a task is: items with their references, a score for each answer, and how prompts are cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval import checks

COUNT = 20
KINDS = {"limit": checks.whole(1), "count": checks.whole(1), "seed": checks.whole(0)}


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within its task, and the same in every run: results are resumed by it.
        prompt: text, or token ids that are taken as they are.
        references: right answers; what they mean is the task's matter.
        max_new_tokens: longest answer.
        group: what it is reported under besides the whole: a subset, a length, a depth.
        meta: what the score needs besides; JSON.
    """

    id: str
    prompt: str | tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Items and how their answers are judged.

    Attributes:
        name: as on the command line.
        items: in the order of the data.
        score: (item, answer text) → 0 to 1; called outside of jit, may be slow.
        metric: name of that number, e.g. "exact_match", "qa_f1", "pass@1".
        stops: texts at which an answer to a raw prompt ends (they are cut off), such as the
            beginning of the next example; the model's EOS ids always end it.
        truncate: what becomes of prompts longer than the context: "middle" keeps both ends
            (LongBench's protocol), "left" the end, "refuse" is an error.
        chat: whether instruct models get the prompt inside their chat template.
        raw: why all prompts are raw text, and what to choose for a chat template, if anything.
        chat_stops: as `stops`, of answers inside the template. The end of the turn ends these, so
            a text that an answer may contain, such as a line end or a heading, is none of them.
        summary: further numbers from all (item, answer, score), for results.json.
    """

    name: str
    items: tuple[Item, ...]
    score: Callable[[Item, str], float]
    metric: str
    stops: tuple[str, ...] = ()
    truncate: Literal["middle", "left", "refuse"] = "middle"
    chat: bool = True
    raw: str = ""
    chat_stops: tuple[str, ...] = ()
    summary: Callable[[list[tuple[Item, str, float]]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says about a task.

    Attributes:
        data_dir: folder with local files; None: the hub dataset, where the task has one.
        tokenizer: of the model, for tasks that build prompts of a length in tokens.
        limit: the first so many items of each subset; None: all.
        lengths: prompt lengths in tokens, for tasks that generate their prompts.
        count: prompts of each length (and depth), for the same; None: COUNT.
        subsets: of those that have subsets; empty: all.
        seed: of generated prompts.
        shots: examples in the prompt, where the task has a choice.
        settings: further key=value settings of one task.
    """

    data_dir: Path | None = None
    tokenizer: Any = None
    limit: int | None = None
    lengths: tuple[int, ...] = ()
    count: int | None = None
    subsets: tuple[str, ...] = ()
    seed: int = 0
    shots: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        checks.check(KINDS, limit=self.limit, count=self.count, seed=self.seed)
        checks.refuse([f"a length is {n!r}, expected ≥ 0" for n in self.lengths if n < 0])
        for name in ("lengths", "subsets"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} are {', '.join(map(str, given))}, expected each once")

    @property
    def prompts_each(self) -> int:
        """Prompts of each length that are generated."""
        count = COUNT if self.count is None else self.count
        return count if self.limit is None else min(count, self.limit)


def check_form(task: Task, chat: bool) -> None:
    """Raises ValueError where a chat template is asked for that no prompt would be put into."""
    if chat and not (task.chat and any(item.meta.get("chat", True) for item in task.items)):
        why = task.raw or "these prompts are raw text, expected no --chat"
        raise ValueError(f"--chat would change no prompt of task {task.name}: {why}")
