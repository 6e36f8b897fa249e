"""Needle and reasoning in a haystack: questions of kvjax.tasks on a grid of lengths and depths.

needle: a value of a key, somewhere in a long text, and a question for it; with distractors=5 it is
the multi-key needle. reasoning: the favorite thing of the older of two people (HeadKV, section
3.1); the depth is that of the answer's sentence.

The prompts are English, with RULER's texts in `needle` (`kvjax.tasks.english`). A tokenizer that
cannot write English, such as the embedded model's, gets the language of `kvjax.tasks.people`.

A decoded English answer is judged by its first sentence. A fed one (protocols teacher and after) is
judged by its own tokens; in the language of the embedded model the end of the sequence must follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.task import Item, Reads, Source, Task, TaskOptions, check_options
from kvjax.example import Example
from kvjax.tasks import needle as single_fact
from kvjax.tasks import two_hop
from kvjax.tasks.language import TEXTS, Needles
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.recall import EVALUATION_STREAM, language_of
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text import exact_match, rouge1_recall

LENGTHS = (512, 1024)
DEPTHS = 10
MORE_TOKENS = 4  # more than the longest answer: room for an EOS, and for other spellings
ENGLISH_TOKENS = 24  # models that write English may begin with a few words
CHAT_TOKENS = 64  # models that chat answer in a sentence
ID_METRICS = {"exact_match": exact_match, "rouge1_recall": rouge1_recall}
METRICS = (*ID_METRICS, "contains")
OPTIONS = ("limit", "lengths", "count", "seed")
SETTINGS = ("haystack", "depths", "distractors", "answer_length", "metric")
KINDS = ("key", "value", "values")
NEEDLE_READS = Reads(
    OPTIONS, (*SETTINGS, *KINDS, *(text for text in TEXTS if text != "age")), scoring=("metric",)
)
REASONING_READS = Reads(OPTIONS, (*SETTINGS, *TEXTS), scoring=("metric",))
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


def load_needle(options: TaskOptions) -> Task:
    """The needle task, see `load`. Three more settings: key and value, which are the kinds of keys
    and values (word, number or uuid), and values, the number of values of each key."""
    check_options("needle", options, NEEDLE_READS)
    needles = Needles(
        key=options.settings.get("key"),
        value=options.settings.get("value"),
        values=number(options, "values", 1, 1),
    )
    return load("needle", single_fact.generate, options, needles=needles)


def load_reasoning(options: TaskOptions) -> Task:
    """The reasoning task, see `load`. One more setting: age, the sentence with an age."""
    check_options("reasoning", options, REASONING_READS)
    return load("reasoning", two_hop.generate, options)


def load(name: str, generate: Callable[..., Example], options: TaskOptions, **more: Any) -> Task:
    """A task whose groups are "length/depth", with `options.prompts_each` prompts each.

    Args:
        generate: `kvjax.tasks.needle.generate`, or a function with the same arguments.
        options: its `settings` are haystack (a text file whose sentences surround the facts; by
            default sentences are generated), depths (their number, from start to end), distractors
            (facts that are not asked for), answer_length (in words, or digits of a number), metric
            (contains, exact_match or rouge1_recall), and the texts of the prompt (instruction,
            needle, question, answer_prefix: see `kvjax.tasks.language.Wording`).
        more: further arguments of `generate`.

    Raises:
        ValueError: no tokenizer, an unknown setting, a text without its placeholders, a length that
            cannot hold the facts, or a haystack that is too short.
    """
    if options.tokenizer is None:
        raise ValueError(f"task {name} makes prompts of a length in tokens: it needs a tokenizer")
    settings, vocab = options.settings, TokenizerVocabulary(options.tokenizer, options.chat)
    language = language_of(vocab)
    metric = settings.get("metric", "exact_match" if language.then_eos else "contains")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    path = settings.get("haystack")
    asked = "answer_length" in settings
    rest = {
        "filler": read_haystack(path, vocab) if path else None,
        "distractors": number(options, "distractors", 0, 0),
        "answer_length": number(options, "answer_length", 1, 1) if asked else None,
        "texts": {text: settings[text] for text in TEXTS if text in settings},
        **more,
    }
    depths = np.linspace(0.0, 1.0, number(options, "depths", DEPTHS, 1)).tolist()
    examples: list[tuple[str, Example]] = []
    options.check_lengths(lengths := options.lengths or LENGTHS)
    for length in lengths:
        for depth in depths:
            # A cell's prompts depend on its length and depth only, not on the other cells of a run.
            cell = [EVALUATION_STREAM, options.seed, length, round(1000 * depth)]
            rng = np.random.default_rng(cell)
            group = f"{length}/{depth:.2f}"
            examples += [
                (group, generate(rng, vocab, length, depth=depth, **rest))
                for _ in range(options.prompts_each)
            ]
    return _task(name, examples, options.chat, metric)


def number(options: TaskOptions, name: str, default: int, least: int) -> int:
    """The value of a setting that must be a whole number, at least `least`."""
    text = options.settings.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} is {text!r}, expected a whole number ≥ {least}")
    return int(text)


def _task(name: str, examples: Sequence[tuple[str, Example]], chat: bool, metric: str) -> Task:
    closed = all(example.then_eos for _, example in examples)
    longest = max(len(example.answer) for _, example in examples)
    longest += MORE_TOKENS if closed else ENGLISH_TOKENS
    longest = max(longest, CHAT_TOKENS) if chat else longest
    items = []
    for index, (group, example) in enumerate(examples):
        meta: dict[str, Any] = {"question_tokens": example.question_length}
        # Several values have no order, so no single right answer can be fed.
        if len(example.answers) == 1:
            meta = {"answer": list(example.answer)} | meta
        meta |= {"chat": True} if chat else {}
        meta |= {} if example.then_eos else {"then_eos": False}
        item_id = f"{group}/{index}"
        items.append(Item(item_id, example.prompt, example.answers, longest, group, meta))

    def score(item: Item, text: str) -> float:
        return judged(metric, text if closed else first_sentence(text), item.references)

    stops = ("\n",) if closed else ()
    return Task(name, tuple(items), score, metric, stops, truncate="refuse")


def first_sentence(text: str) -> str:
    """The text up to its first full stop, question or exclamation mark, or line end."""
    return SENTENCE_END.split(text.strip(), maxsplit=1)[0]


def judged(metric: str, text: str, references: Sequence[str]) -> float:
    """The score of an answer, by its lower-case words without punctuation.

    contains: the share of the references that the text has as whole words. (RULER's string match
    also takes a number that is part of a longer one.)
    exact_match and rouge1_recall compare with all references, in their order.
    """
    if metric == "contains":
        said, *wanted = word_ids(text, *references)
        return float(np.mean([_within(said, words) for words in wanted]))
    return ID_METRICS[metric](*word_ids(text, " ".join(references)))


def _within(said: list[int], words: list[int]) -> bool:
    return any(said[at : at + len(words)] == words for at in range(len(said) - len(words) + 1))


def word_ids(*texts: str) -> list[list[int]]:
    """Lower-case words without punctuation, each a number, for the scores of `kvjax.text`."""
    ids: dict[str, int] = {}
    return [
        [ids.setdefault(word, len(ids)) for word in re.findall(r"[^\W_]+", text.lower())]
        for text in texts
    ]


needle = Source(load_needle, lambda options: NEEDLE_READS)
reasoning = Source(load_reasoning, lambda options: REASONING_READS)
