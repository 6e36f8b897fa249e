"""Head importance with a tokenizer: examples are generated in the tokenizer's tokens and scored.

`score_heads` is the public entry. `Grid` describes the examples, `make_examples` generates them,
and `kvjax.headkv.measure.score_examples` asks them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checks import COUNT, SEED, check_ranges
from kvjax.example import Example
from kvjax.headkv.measure import score_examples
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.policies.importance import HeadScores
from kvjax.tasks import needle, repeated_spans, two_hop
from kvjax.tasks.prompt import Filler, read_haystack
from kvjax.tasks.words import TokenizerVocabulary

LENGTHS = 4  # prompt lengths of the grid, evenly spaced up to the longest
LEAST_HAYSTACK = 16  # tokens of filler in the shortest prompt
COPIED_LENGTH = 64  # tokens that the copying estimator copies: fewer give a less stable ranking
DISTRACTORS = 3  # examples have 0, 1 and 2 distractors in turn
RANGES = {"samples": COUNT, "length": COUNT, "seed": SEED}
"""Allowed values of the numbers of a `Grid`."""


@dataclass(frozen=True)
class Grid:
    """The examples that importance is measured on.

    Prompts have four lengths: a quarter of the samples each have 1/4, 2/4, 3/4 and all of `length`,
    or the shortest length that holds the facts. Facts are at evenly spaced depths.

    Attributes:
        estimator: retrieval, retrieval_reasoning, enhanced_retrieval, copying or gradient
        samples: number of examples
        length: longest prompt, in tokens
        seed: seed of the facts, the filler and the random spans
        haystack: text file whose sentences hide the facts, instead of generated sentences
    """

    estimator: str = "retrieval_reasoning"
    samples: int = 64
    length: int = 512
    seed: int = 0
    haystack: Path | None = None


Question = Callable[..., Example]
"""Makes one example from (rng, vocab, length, index of the sample, depth, filler)."""


def _facts(generate: Callable[..., Example]) -> Question:
    def ask(rng, vocab, length, index, depth, filler):
        distractors = index % DISTRACTORS
        return generate(rng, vocab, length, distractors=distractors, depth=depth, filler=filler)

    return ask


def _random_span(rng, vocab, length, index, depth, filler):
    if filler is not None:
        raise ValueError("the copying estimator asks for random tokens, expected no haystack")
    ids = vocab.ordinary_ids
    return repeated_spans.generate(rng, vocab, length, COPIED_LENGTH, depth=depth, ids=ids)


QUESTIONS: dict[str, Question] = {
    "retrieval": _facts(needle.generate),
    "enhanced_retrieval": _facts(needle.generate),
    "retrieval_reasoning": _facts(two_hop.generate),
    "copying": _random_span,
    "gradient": _facts(two_hop.generate),
}
"""The questions of each estimator. The first three ask the kinds of questions of the HeadKV paper
(arXiv 2410.19258, 3.1) with other prompts and answers: docs/headkv.md lists the differences."""


def score_heads(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    estimator: str = "retrieval_reasoning",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    haystack: str | Path | None = None,
) -> HeadScores:
    """Importance of every query head, from examples in the model's own tokens.

    To measure it on your own examples, use `kvjax.headkv.score_examples`.

    Args:
        tokenizer: from `kvjax.load_tokenizer`.
        estimator: "retrieval", "retrieval_reasoning" or "enhanced_retrieval" count the examples
            that the model answers; "copying" is for models that cannot answer questions;
            "gradient" is the sensitivity of the loss of the answer.
        samples, length, seed, haystack: see `Grid`.
        batch_size: examples at a time.

    Raises:
        ValueError: an unknown estimator, a length that cannot hold the facts, no example that
            the model answers, or a haystack that is missing or too short.
    """
    path = None if haystack is None else local_path(haystack, "the haystack")
    grid = Grid(estimator, samples, length, seed, path)
    examples = make_examples(tokenizer, grid)
    scores = score_examples(model, params, examples, estimator=estimator, batch_size=batch_size)
    return with_origin(scores, model, grid)


def with_origin(scores: HeadScores, model: Transformer, grid: Grid) -> HeadScores:
    """Adds the model and the grid to the metadata of the scores."""
    origin: dict[str, Any] = {"model": model_name(model), "seed": grid.seed, "length": grid.length}
    if grid.haystack is not None:
        origin["haystack"] = grid.haystack.name
    return HeadScores(scores.samples, scores.meta | origin)


def model_name(model: Transformer) -> str:
    """The last part of the checkpoint's path."""
    return Path(model.config.source).name


def make_examples(tokenizer: Any, grid: Grid) -> list[Example]:
    """The examples of a grid, in the tokens of a tokenizer.

    Raises:
        ValueError: an unknown estimator, or numbers or a haystack that `score_heads` refuses.
    """
    if grid.estimator not in QUESTIONS:
        raise ValueError(f"estimator is {grid.estimator!r}, expected one of {', '.join(QUESTIONS)}")
    check_ranges(vars(grid), RANGES)
    vocab = TokenizerVocabulary(tokenizer)
    filler = None if grid.haystack is None else read_haystack(grid.haystack, vocab)
    rng = np.random.default_rng(grid.seed)
    depths = np.linspace(0.0, 1.0, grid.samples).tolist()
    return [_ask(rng, vocab, grid, index, depth, filler) for index, depth in enumerate(depths)]


def _ask(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    grid: Grid,
    index: int,
    depth: float,
    filler: Filler | None,
) -> Example:
    """One sample of the grid, long enough for its facts and at least LEAST_HAYSTACK of filler."""
    ask = QUESTIONS[grid.estimator]
    # A copy of the generator finds the length of the facts and leaves the random numbers unused.
    facts = ask(copy.deepcopy(rng), vocab, None, index, depth, filler)
    shortest = len(facts.prompt) + LEAST_HAYSTACK
    if grid.length < shortest:
        raise ValueError(
            f"got length {grid.length}, expected ≥ {shortest} for facts, question and some filler"
        )
    length = grid.length * (index % LENGTHS + 1) // LENGTHS
    return ask(rng, vocab, max(length, shortest), index, depth, filler)
