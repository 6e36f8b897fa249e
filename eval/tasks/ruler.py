"""RULER: retrieval, tracking, aggregation and questions at any length (arXiv 2404.06654).

With `lengths` the prompts are generated, `count` of each task and length, with exactly that many
tokens (the answer comes on top); groups are "niah_single_1/4096". They are token ids and end with
the beginning of the answer, so no chat template is put around them. Settings:

- haystack=FILE: a text (plain, .gz, .xz) for the tasks whose haystack is an essay; else generated.
- squad=FILE, hotpotqa=FILE: for qa_1 and qa_2; DATA_DIR/ruler/squad.json and hotpotqa.json (also
  packed) serve as well. Without such files the two are left out, which the summary says, or an
  error where they are asked for.

Without `lengths` ready files are read: rows {input, outputs} of DATA_DIR/ruler/TASK.jsonl (or .gz,
.xz), as the benchmark's own scripts write them; groups are the tasks' names.

The score is string_match_all, the share of the answers that the text contains (case ignored), and
for the two questions string_match_part, whether it contains any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from eval import rows
from eval.reads import Reads, check
from eval.ruler import documents, frequent, needles, text, tracking
from eval.task import Item, Task, TaskOptions
from kvjax.tasks.words import TokenizerVocabulary

QUESTIONS = {"qa_1": ("squad", documents.squad), "qa_2": ("hotpotqa", documents.hotpotqa)}
MAX_NEW_TOKENS = {
    **dict.fromkeys(needles.TASKS, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
"""Of all tasks, in the paper's order; its own script's numbers."""

Make = Callable[[np.random.Generator, int, int], text.Prompt]
"""(rng, length, index of the prompt) to the prompt."""


def reads(options: TaskOptions) -> Reads:
    """Generated prompts have settings and a number; ready files have neither."""
    if options.lengths:
        names = ("data_dir", "limit", "lengths", "count", "subsets", "seed")
        return Reads(names, ("haystack", "squad", "hotpotqa"))
    why = "without --lengths it reads ready files"
    return Reads(("data_dir", "limit", "lengths", "subsets"), why=why)


def load(options: TaskOptions) -> Task:
    """The named tasks; without names all that can be had.

    Raises:
        ValueError: an unknown task, neither lengths nor files, a missing file, or a length that
            is too short.
    """
    check("ruler", options, reads(options))
    unknown = [name for name in options.subsets if name not in MAX_NEW_TOKENS]
    if unknown:
        raise ValueError(
            f"RULER has no {', '.join(unknown)}, expected some of {', '.join(MAX_NEW_TOKENS)}"
        )
    folder = None if options.data_dir is None else Path(options.data_dir) / "ruler"
    items = _generated(options, folder) if options.lengths else _ready(options, folder)
    return Task(
        name="ruler",
        items=tuple(items),
        score=score,
        metric="string_match",
        truncate="refuse",
        chat=False,
        raw="they end with the beginning of the answer, expected no --chat",
        summary=summary,
    )


def score(item: Item, answer: str) -> float:
    """Share of the references that the answer contains; for questions, whether any."""
    found = [reference.lower() in answer.lower() for reference in item.references]
    return float(any(found) if item.meta["task"] in QUESTIONS else np.mean(found))


def summary(results: list[tuple[Item, str, float]]) -> dict[str, list[str]]:
    """Which of the 13 tasks the score is of, and which not."""
    run = {item.meta["task"] for item, *_ in results}
    return {
        "tasks": [name for name in MAX_NEW_TOKENS if name in run],
        "left_out": [name for name in MAX_NEW_TOKENS if name not in run],
    }


def _ready(options: TaskOptions, folder: Path | None) -> list[Item]:
    names = options.subsets
    if folder is not None and not names:
        names = tuple(name for name in MAX_NEW_TOKENS if rows.look(folder, name, (".jsonl",)))
    if folder is None or not names:
        raise ValueError(
            "RULER's prompts are generated: give lengths in tokens (4096, 8192), or --data-dir "
            "with ready ones in ruler/TASK.jsonl"
        )
    items: list[Item] = []
    for name in names:
        path = rows.find(folder, name, (".jsonl",), of="ready prompts of RULER, or give lengths")
        for index, row in enumerate(rows.read_rows(path, options.limit)):
            prompt = row.text("input")
            if "answer_prefix" in row.values:
                prompt += row.text("answer_prefix")
            answers = tuple(row.texts("outputs"))
            items.append(_item(f"{name}-{index}", name, prompt, answers, name))
    return items


def _generated(options: TaskOptions, folder: Path | None) -> list[Item]:
    if options.tokenizer is None:
        raise ValueError("RULER's prompts are generated in tokens: a tokenizer is needed")
    makers = _makers(options, folder, TokenizerVocabulary(options.tokenizer))
    items: list[Item] = []
    for name, make in makers.items():
        for length in options.lengths:
            for index in range(options.prompts_each):
                number = list(MAX_NEW_TOKENS).index(name)
                rng = np.random.default_rng([options.seed, number, length, index])
                try:
                    prompt = make(rng, length, index)
                except ValueError as error:
                    raise ValueError(f"RULER's {name} at {length} tokens: {error}") from error
                id, group = f"{name}-{length}-{index}", f"{name}/{length}"
                items.append(_item(id, name, prompt.ids, prompt.answers, group))
    return items


def _makers(
    options: TaskOptions, folder: Path | None, vocab: TokenizerVocabulary
) -> dict[str, Make]:
    """How to make each of the wanted tasks."""
    file = options.settings.get("haystack")
    essay = text.essay(file, vocab) if file else None
    found: dict[str, Make] = {}
    for name in options.subsets or MAX_NEW_TOKENS:
        if name in QUESTIONS:
            path = _corpus_file(name, options.settings, folder)
            if path is not None:
                found[name] = _question_maker(name, path, vocab, options.seed)
            elif name in options.subsets:
                setting = QUESTIONS[name][0]
                raise ValueError(
                    f"RULER's {name} needs a file of questions: give {setting}=FILE, or "
                    f"DATA_DIR/ruler/{setting}.json"
                )
        else:
            found[name] = functools.partial(_make, name, vocab, essay)
    return found


def _make(name, vocab, essay, rng: np.random.Generator, length: int, index: int) -> text.Prompt:
    if name in needles.TASKS:
        return needles.generate(rng, vocab, length, needles.TASKS[name], essay)
    others = {
        "vt": tracking.generate,
        "cwe": frequent.common_words,
        "fwe": frequent.frequent_words,
    }
    return others[name](rng, vocab, length)


def _corpus_file(name: str, settings: Mapping[str, str], folder: Path | None) -> Path | None:
    setting = QUESTIONS[name][0]
    if setting in settings:
        return Path(settings[setting])
    return None if folder is None else rows.look(folder, setting, (".json",))


def _question_maker(name: str, path: Path, vocab: TokenizerVocabulary, seed: int) -> Make:
    corpus = QUESTIONS[name][1](path)
    order = np.random.default_rng([seed, len(corpus.questions)]).permutation(len(corpus.questions))

    def make(rng: np.random.Generator, length: int, index: int) -> text.Prompt:
        question = corpus.questions[order[index % len(order)]]
        return documents.generate(rng, vocab, length, question, corpus.paragraphs)

    return make


def _item(
    id: str, task: str, prompt: str | tuple[int, ...], answers: tuple[str, ...], group: str
) -> Item:
    return Item(id, prompt, answers, MAX_NEW_TOKENS[task], group, {"task": task})
