"""What a run consists of before it has a model: a task's items, its options, and the settings.

A task is a module of eval/tasks with `load(options) -> Task` and `reads(options) -> Reads`. An
option that the task would ignore is an error.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kvjax.checks import COUNT, NOT_NEGATIVE, SEED, SIZE, Range, check_ranges, optional

TASKS = {
    "needle": "eval.tasks.haystack:needle",
    "reasoning": "eval.tasks.haystack:reasoning",
    "babilong": "eval.tasks.babilong",
    "ruler": "eval.tasks.ruler",
    "longbench": "eval.tasks.longbench",
    "loogle": "eval.tasks.loogle",
    "longchat": "eval.tasks.longchat",
    "gsm8k": "eval.tasks.gsm8k",
    "humaneval": "eval.tasks.code:humaneval",
    "mbpp": "eval.tasks.code:mbpp",
}
"""Name → module of the task, or module:source where a module holds several tasks."""

PROMPTS = 20
"""Number of generated prompts of each length and depth."""
OPTION_RANGES = {"limit": optional(COUNT), "count": optional(COUNT), "seed": SEED}
SETTING_RANGES = {
    "batch_size": COUNT,
    "max_length": Range(least=2, most=COUNT.most, whole=True, optional=True),
    "temperature": NOT_NEGATIVE,
    "top_p": Range(above=0, most=1),
    "top_k": SIZE,
    "seed": SEED,
}
PROTOCOLS = ("generate", "teacher", "after")
UNJUDGED = ("tokenizer", "settings", "seed", "chat", "most_tokens")
"""Fields that `check_options` leaves alone: the seed may be that of sampled answers, and
`check_form` judges the chat template."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within its task and the same in every run: an interrupted run continues by ids.
        prompt: text, or token ids that are used unchanged, inside the chat template where
            `TaskOptions.chat` asked for it.
        references: right answers; each task defines how they are compared.
        max_new_tokens: longest answer.
        group: a subset, length or depth that gets its own score; "" for none.
        meta: JSON values that the task's score needs.
    """

    id: str
    prompt: str | tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Items, and how their answers are judged.

    Attributes:
        name: as on the command line.
        items: in the order of the data.
        score: (item, answer text) → 0 to 1; called outside of jit, may be slow.
        metric: name of the score, e.g. "exact_match", "qa_f1", "pass@1".
        stops: texts that end an answer to a raw prompt and are cut off, such as the beginning of
            the next example. The model's EOS ids always end an answer.
        truncate: rule for prompts longer than the context: "middle" keeps both ends (LongBench's
            protocol), "left" keeps the end, "refuse" raises an error.
        chat: whether instruct models get the prompt inside their chat template.
        raw: for an error: why all prompts are raw text, and what to choose for a chat template.
        chat_stops: as `stops`, for answers inside the template. The end of the turn ends these
            answers, so no text that an answer may contain, such as a line end, belongs here.
        summary: (item, answer, score) of all items → further numbers for results.json.
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
    """The options of a task, as the command line gives them.

    Attributes:
        data_dir: folder with local files; None: the hub dataset, where the task has one.
        tokenizer: the model's, for tasks that build prompts of a length in tokens.
        limit: number of items of each subset, from its start; None: all.
        lengths: prompt lengths in tokens, for tasks that generate their prompts.
        count: generated prompts of each length and depth; None: COUNT.
        subsets: names of subsets; empty: all.
        seed: of generated prompts.
        shots: examples in the prompt, where the task has a choice.
        settings: further key=value settings of one task.
        chat: whether prompts that are made as token ids are inside the chat template.
        most_tokens: longest prompt that a model can read; None: not known, or prompts may be cut.
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
    chat: bool = False
    most_tokens: int | None = None

    def __post_init__(self):
        check_ranges(vars(self), OPTION_RANGES)
        lengths = {f"lengths[{index}]": length for index, length in enumerate(self.lengths)}
        check_ranges(lengths, dict.fromkeys(lengths, SIZE))
        for name in ("lengths", "subsets"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} are {', '.join(map(str, given))}, expected each once")

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raises ValueError for lengths that the model cannot read, before prompts are made."""
        most = self.most_tokens
        if most is not None and max(lengths) > most:
            raise ValueError(
                f"got prompts of {max(lengths)} tokens, expected at most {most}, which the model "
                "reads: --lengths sets others"
            )

    @property
    def prompts_each(self) -> int:
        """Number of generated prompts of each length and depth."""
        count = PROMPTS if self.count is None else self.count
        return count if self.limit is None else min(count, self.limit)


@dataclass(frozen=True)
class Settings:
    """How a run makes predictions: everything that they depend on besides model and task.

    Attributes:
        policies: names and settings, as in `kvjax.generate`.
        protocol: "generate": greedy or sampled answers, scored by the task. "teacher": the right
            answer is fed through the compressed cache; the score is 1 if every token of it, and the
            EOS after it, is the most likely one. "after": the same, with the question asked after
            the compression. Each batch of prompts is read once for all policies.
        chat: prompts inside the tokenizer's chat template.
        batch_size: prompts at a time.
        max_length: tokens of prompt and answer; None for the model's context.
        temperature, top_p, top_k: see `kvjax.generate`.
        seed: of sampled answers.
    """

    policies: tuple[str, ...] = ("full",)
    protocol: str = "generate"
    chat: bool = False
    batch_size: int = 8
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        check_ranges(vars(self), SETTING_RANGES)
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol is {self.protocol!r}, expected one of {', '.join(PROTOCOLS)}"
            )
        if not self.policies:
            raise ValueError("got no policies, expected at least one")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies are {', '.join(self.policies)}, expected each once")
        if self.protocol != "generate" and self.temperature:
            raise ValueError(
                f"protocol {self.protocol!r} feeds the right answer, expected temperature 0"
            )
        # Settings without an effect are errors, here as on the command line.
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise ValueError(
                f"top_p is {self.top_p} and top_k is {self.top_k} at temperature 0, which takes "
                "the most likely token: expected a temperature above 0, or neither"
            )


def check_form(task: Task, settings: Settings) -> None:
    """Raises ValueError where the settings ask for the chat template and it has no place."""
    if not settings.chat:
        return
    if not (task.chat and any(item.meta.get("chat", True) for item in task.items)):
        why = task.raw or "these prompts are raw text, expected no --chat"
        raise ValueError(f"--chat would change no prompt of task {task.name}: {why}")
    # Only tasks that make their prompts as ids know how an answer begins inside the template.
    if settings.protocol != "generate" and any(isinstance(i.prompt, str) for i in task.items):
        raise ValueError(
            f"protocol {settings.protocol!r} feeds the right answer after the raw prompt of task "
            f"{task.name}, expected no chat template"
        )


@dataclass(frozen=True)
class Reads:
    """The options and settings that a task reads.

    Attributes:
        options: names of fields of `TaskOptions`.
        settings: keys of `--set`.
        scoring: the settings that have an effect only where answers are decoded.
        why: for an error: why the given options rule out others.
    """

    options: tuple[str, ...]
    settings: tuple[str, ...] = ()
    scoring: tuple[str, ...] = ()
    why: str = ""


def check_options(name: str, options: TaskOptions, reads: Reads) -> None:
    """Raises ValueError that names every option and setting that the task would ignore."""
    # An option that is ignored would give a result that looks like another.
    unknown = [key for key in options.settings if key not in reads.settings]
    if unknown:
        known = f"one of {', '.join(reads.settings)}" if reads.settings else "none: it has none"
        raise ValueError(
            f"task {name}: unknown setting {', '.join(map(repr, unknown))}, "
            f"expected {known}{_why(reads)}"
        )
    given = [
        field.name
        for field in dataclasses.fields(options)
        if field.name not in (*UNJUDGED, *reads.options)
        and getattr(options, field.name) != field.default
    ]
    if given:
        raise ValueError(
            f"task {name} does not read {flags(given)}, expected only {flags(reads.options)}"
            f"{_why(reads)}"
        )


def chosen(options: TaskOptions, name: str, choices: tuple[str, ...]) -> str:
    """The value of a setting that has a few; without a value, the first.

    Raises:
        ValueError: another value.
    """
    value = options.settings.get(name, choices[0])
    if value not in choices:
        raise ValueError(f"{name}={value}, expected one of {', '.join(choices)}")
    return value


def flags(names: tuple[str, ...] | list[str]) -> str:
    """Names of fields as on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _why(reads: Reads) -> str:
    return f" ({reads.why})" if reads.why else ""


class Source(NamedTuple):
    """One of several tasks in a module: the two functions that other tasks' modules have."""

    load: Callable[[TaskOptions], Task]
    reads: Callable[[TaskOptions], Reads]


def load_task(name: str, options: TaskOptions) -> Task:
    """The task of this name.

    Raises:
        ValueError: no such task, options that it would ignore, or data that it cannot read.
    """
    return _source(name).load(options)


def reads_of(name: str, options: TaskOptions) -> Reads:
    """What the task reads of options like these.

    Raises:
        ValueError: no such task.
    """
    return _source(name).reads(options)


def _source(name: str) -> Any:
    """The module or `Source` of a task; imported when it is asked for."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}, expected one of {', '.join(TASKS)}")
    module, _, source = TASKS[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, source) if source else found
