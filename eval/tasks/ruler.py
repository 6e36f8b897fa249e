"""RULER: retrieval, tracking, aggregation and questions at any length (arXiv 2404.06654).

The kinds of questions, their numbers of keys, values, hops and words, and the scores are the
paper's. So are the texts of the eight retrieval tasks (`kvjax.tasks.english`). The sentences of the
other tasks and of generated haystacks are this project's, so results compare policies and models
here, but are not the paper's numbers.

With `lengths` the prompts are generated, `count` of each task and length. A prompt has exactly that
many tokens, without the answer; groups are "niah_single_1/4096". Prompts are token ids and end with
the beginning of the answer; with --chat the assistant's turn begins with it. Settings:

- haystack=FILE: a text (plain, .gz, .xz) for tasks whose haystack is an essay; by default
  sentences are generated.
- squad=FILE, hotpotqa=FILE: for qa_1 and qa_2; by default DATA_DIR/ruler/squad.json and
  hotpotqa.json (also packed). Without these files the two tasks are left out, and the summary says
  so; it is an error to ask for them.

Without `lengths` ready files are read: rows {input, outputs} of DATA_DIR/ruler/TASK.jsonl (or .gz,
.xz), as the benchmark's own scripts write them. Groups are the tasks' names.

The score is string_match_all, the share of the answers that the text contains (case ignored). For
the two question tasks it is string_match_part, whether the text contains any answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from eval import rows
from eval.ruler import aggregation, questions, retrieval
from eval.ruler.text import Prompt
from eval.task import Item, Reads, Task, TaskOptions, check_options
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.words import TokenizerVocabulary

QUESTIONS = {"qa_1": ("squad", questions.squad), "qa_2": ("hotpotqa", questions.hotpotqa)}
MAX_NEW_TOKENS = {
    **dict.fromkeys(retrieval.RETRIEVAL_TASKS, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}
"""The longest answer of each task, from the benchmark's script, in the paper's order."""

Make = Callable[[np.random.Generator, int, int], Prompt]
"""(rng, length, index of the prompt) → the prompt."""


def reads(options: TaskOptions) -> Reads:
    """The options that RULER reads. Only generated prompts have settings and a number."""
    if options.lengths:
        names = ("data_dir", "limit", "lengths", "count", "subsets", "seed")
        return Reads(names, ("haystack", "squad", "hotpotqa"))
    why = "without --lengths it reads ready files"
    return Reads(("data_dir", "limit", "lengths", "subsets"), why=why)


def load(options: TaskOptions) -> Task:
    """The named tasks; without names all tasks whose data is available.

    Raises:
        ValueError: an unknown task, neither lengths nor files, a missing file, or a length that
            is too short.
    """
    check_options("ruler", options, reads(options))
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
        chat=bool(options.lengths),
        raw="ready prompts end with the beginning of the answer, expected no --chat",
        summary=summary,
    )


def score(item: Item, answer: str) -> float:
    """Share of the references that the answer contains; for questions, whether it has any."""
    found = [reference.lower() in answer.lower() for reference in item.references]
    return float(any(found) if item.meta["task"] in QUESTIONS else np.mean(found))


def summary(results: list[tuple[Item, str, float]]) -> dict[str, list[str]]:
    """The tasks that were run, and those of the 13 that were left out."""
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
            # Newer scripts of the benchmark keep the beginning of the answer apart.
            if "answer_prefix" in row.values:
                prompt += row.text("answer_prefix")
            answers = tuple(row.texts("outputs"))
            meta = {"task": name}
            items.append(Item(f"{name}-{index}", prompt, answers, MAX_NEW_TOKENS[name], name, meta))
    return items


def _generated(options: TaskOptions, folder: Path | None) -> list[Item]:
    if options.tokenizer is None:
        raise ValueError("RULER's prompts are generated in tokens: a tokenizer is needed")
    options.check_lengths(options.lengths)
    vocab = TokenizerVocabulary(options.tokenizer, options.chat)
    makers = _makers(options, folder, vocab)
    items: list[Item] = []
    for name, make in makers.items():
        for length in options.lengths:
            for index in range(options.prompts_each):
                number = list(MAX_NEW_TOKENS).index(name)
                # A prompt's random numbers do not depend on which other tasks are run.
                rng = np.random.default_rng([options.seed, number, length, index])
                try:
                    prompt = make(rng, length, index)
                except ValueError as error:
                    raise ValueError(f"RULER's {name} at {length} tokens: {error}") from error
                meta = {"task": name, "question_tokens": prompt.question_length}
                meta |= {"chat": True} if options.chat else {}
                most, group = MAX_NEW_TOKENS[name], f"{name}/{length}"
                items.append(
                    Item(f"{name}-{length}-{index}", prompt.ids, prompt.answers, most, group, meta)
                )
    return items


def _makers(
    options: TaskOptions, folder: Path | None, vocab: TokenizerVocabulary
) -> dict[str, Make]:
    """A function that makes a prompt, for each of the wanted tasks."""
    file = options.settings.get("haystack")
    essay = read_haystack(file, vocab) if file else None
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


def _make(name, vocab, essay, rng: np.random.Generator, length: int, index: int) -> Prompt:
    if name in retrieval.RETRIEVAL_TASKS:
        return retrieval.retrieval(rng, vocab, length, retrieval.RETRIEVAL_TASKS[name], essay)
    others = {
        "vt": retrieval.tracking,
        "cwe": aggregation.common_words,
        "fwe": aggregation.frequent_words,
    }
    return others[name](rng, vocab, length)


def _corpus_file(name: str, settings: Mapping[str, str], folder: Path | None) -> Path | None:
    setting = QUESTIONS[name][0]
    if setting in settings:
        return Path(settings[setting])
    return None if folder is None else rows.look(folder, setting, (".json",))


def _question_maker(name: str, path: Path, vocab: TokenizerVocabulary, seed: int) -> Make:
    corpus = QUESTIONS[name][1](path)
    # Different questions in a random order, and again from the first where they run out.
    order = np.random.default_rng([seed, len(corpus.questions)]).permutation(len(corpus.questions))

    def make(rng: np.random.Generator, length: int, index: int) -> Prompt:
        question = corpus.questions[order[index % len(order)]]
        return questions.question_prompt(rng, vocab, length, question, corpus.paragraphs)

    return make
