"""Questions of kvjax.tasks on a grid of prompt lengths and depths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.reads import Reads, check
from eval.task import Item, Task, TaskOptions
from kvjax.answers import exact_match, rouge1_recall
from kvjax.example import Example
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.recall import EVALUATION_STREAM
from kvjax.tasks.words import TokenizerVocabulary

LENGTHS = (512, 1024)
DEPTHS = 10
MORE_TOKENS = 4  # than the longest answer: room for an EOS, and for other spellings
CHAT_TOKENS = 64  # models that chat answer in a sentence
METRICS = {"exact_match": exact_match, "rouge1_recall": rouge1_recall}
READS = Reads(
    ("limit", "lengths", "count", "seed"),
    ("haystack", "depths", "distractors", "answer_length", "metric"),
    scoring=("metric",),
)


def load(
    name: str, generate: Callable[..., Example], options: TaskOptions, distractors: int = 0
) -> Task:
    """A task whose groups are "length/depth", `options.prompts_each` prompts each.

    Args:
        generate: `kvjax.tasks.needle.generate`, or another with its arguments.
        options: of `settings`: haystack, a text file whose sentences surround the facts (generated
            ones otherwise); depths, how many from start to end; distractors, facts that are not
            asked for; answer_length in words; metric, exact_match or rouge1_recall.
        distractors: where the settings do not say.

    Raises:
        ValueError: no tokenizer, an unknown setting, or a length that cannot hold the facts.
    """
    check(name, options, READS)
    if options.tokenizer is None:
        raise ValueError(f"task {name} makes prompts of a length in tokens: it needs a tokenizer")
    metric = options.settings.get("metric", "exact_match")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    vocab = TokenizerVocabulary(options.tokenizer)
    path = options.settings.get("haystack")
    rest = {
        "filler": read_haystack(path, vocab) if path else None,
        "distractors": number(options, "distractors", distractors, 0),
        "answer_length": number(options, "answer_length", 4, 1),
    }
    depths = np.linspace(0.0, 1.0, number(options, "depths", DEPTHS, 1)).tolist()
    examples: list[tuple[str, Example]] = []
    for length in options.lengths or LENGTHS:
        for depth in depths:
            cell = [EVALUATION_STREAM, options.seed, length, round(1000 * depth)]
            rng = np.random.default_rng(cell)
            group = f"{length}/{depth:.2f}"
            examples += [
                (group, generate(rng, vocab, length, depth=depth, **rest))
                for _ in range(options.prompts_each)
            ]
    return _task(name, examples, options.tokenizer, metric)


def number(options: TaskOptions, name: str, default: int, least: int) -> int:
    """A setting that is a whole number."""
    text = options.settings.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}, expected a whole number ≥ {least}")
    return int(text)


def _task(name: str, examples: Sequence[tuple[str, Example]], tokenizer: Any, metric: str) -> Task:
    chats = bool(getattr(tokenizer, "chat_template", None))
    longest = max(len(example.answer) for _, example in examples) + MORE_TOKENS
    longest = max(longest, CHAT_TOKENS) if chats else longest
    items = []
    for index, (group, example) in enumerate(examples):
        meta: dict[str, Any] = {
            "answer": list(example.answer),
            "question_tokens": example.question_length,
        }
        if chats:
            meta["text"] = tokenizer.decode(example.prompt, skip_special_tokens=True)
        answer = tokenizer.decode(example.answer, skip_special_tokens=True).strip()
        items.append(Item(f"{group}/{index}", example.prompt, (answer,), longest, group, meta))

    def score(item: Item, text: str) -> float:
        return METRICS[metric](*word_ids(text, item.references[0]))

    return Task(name, tuple(items), score, metric, stops=("\n",), truncate="refuse")


def word_ids(*texts: str) -> list[list[int]]:
    """Lower-case words without punctuation, each a number, for the scores of `kvjax.answers`."""
    ids: dict[str, int] = {}
    return [
        [ids.setdefault(word, len(ids)) for word in re.findall(r"[^\W_]+", text.lower())]
        for text in texts
    ]
