"""Needle and reasoning in a haystack: questions of kvjax.tasks on a grid of lengths and depths.

needle: one fact, somewhere in a long text, and a question about it; with distractors=5 it is the
multi-key needle. reasoning: the favorite thing of the older of two people (HeadKV, section 3.1);
the depth is that of the answer's sentence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.task import Item, Reads, Source, Task, TaskOptions, check_options
from kvjax.example import Example
from kvjax.tasks import needle as single_fact
from kvjax.tasks import two_hop
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.recall import EVALUATION_STREAM
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text import exact_match, rouge1_recall

LENGTHS = (512, 1024)
DEPTHS = 10
MORE_TOKENS = 4  # more than the longest answer: room for an EOS, and for other spellings
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
    """A task whose groups are "length/depth", with `options.prompts_each` prompts each.

    Args:
        generate: `kvjax.tasks.needle.generate`, or a function with the same arguments.
        options: its `settings` are haystack (a text file whose sentences surround the facts; by
            default sentences are generated), depths (their number, from start to end), distractors
            (facts that are not asked for), answer_length (in words), and metric (exact_match or
            rouge1_recall).
        distractors: their number where the settings have none.

    Raises:
        ValueError: no tokenizer, an unknown setting, or a length that cannot hold the facts.
    """
    check_options(name, options, READS)
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
            # A cell's prompts depend on its length and depth only, not on the other cells of a run.
            cell = [EVALUATION_STREAM, options.seed, length, round(1000 * depth)]
            rng = np.random.default_rng(cell)
            group = f"{length}/{depth:.2f}"
            examples += [
                (group, generate(rng, vocab, length, depth=depth, **rest))
                for _ in range(options.prompts_each)
            ]
    return _task(name, examples, options.tokenizer, metric)


def number(options: TaskOptions, name: str, default: int, least: int) -> int:
    """The value of a setting that must be a whole number, at least `least`."""
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
        # A chat template wraps text, so items that are ids carry their text too.
        if chats:
            meta["text"] = tokenizer.decode(example.prompt, skip_special_tokens=True)
        answer = tokenizer.decode(example.answer, skip_special_tokens=True).strip()
        items.append(Item(f"{group}/{index}", example.prompt, (answer,), longest, group, meta))

    def score(item: Item, text: str) -> float:
        return METRICS[metric](*word_ids(text, item.references[0]))

    return Task(name, tuple(items), score, metric, stops=("\n",), truncate="refuse")


def word_ids(*texts: str) -> list[list[int]]:
    """Lower-case words without punctuation, each a number, for the scores of `kvjax.text`."""
    ids: dict[str, int] = {}
    return [
        [ids.setdefault(word, len(ids)) for word in re.findall(r"[^\W_]+", text.lower())]
        for text in texts
    ]


def _source(name: str, generate: Callable[..., Example]) -> Source:
    return Source(functools.partial(load, name, generate), lambda options: READS)


needle = _source("needle", single_fact.generate)
reasoning = _source("reasoning", two_hop.generate)
