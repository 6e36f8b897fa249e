"""The examples that head importance is measured on, in the tokens of a model's tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.example import Example
from kvjax.headkv.importance import score_examples
from kvjax.headkv.scores import HeadScores
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.ranges import COUNT, SEED, check_ranges
from kvjax.tasks import haystack, needle, repeated_spans, two_hop
from kvjax.tasks.prompt import Filler
from kvjax.tasks.vocabulary import TokenizerVocabulary

LENGTHS = 4  # prompt lengths of the grid, evenly up to the longest
LEAST_HAYSTACK = 16  # tokens of filler in the shortest prompt
COPIED_LENGTH = 64  # steps of the copying estimator: with fewer the ranking is less stable
DISTRACTORS = 3  # 0, 1 and 2 in turn
RANGES = {"samples": COUNT, "length": COUNT, "seed": SEED}
"""The numbers of a `Grid`."""


@dataclass(frozen=True)
class Grid:
    """The examples to ask, apart from the tokenizer.

    Attributes:
        estimator: a name of `QUESTIONS`.
        samples: how many.
        length: longest prompt in tokens; a quarter of the samples each at 1/4, 2/4, 3/4 and all
            of it, or where the facts begin to fit; depths evenly from start to end.
        seed: of the facts, the filler and the random spans.
        haystack: a text file whose sentences are the filler; None for generated sentences.
    """

    estimator: str = "retrieval_reasoning"
    samples: int = 64
    length: int = 512
    seed: int = 0
    haystack: Path | None = None


Question = Callable[..., Example]
"""(rng, vocab, length, index of the sample, depth, filler) to one example."""


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
"""What each estimator asks. The first three ask the kinds of questions of the HeadKV paper (arXiv
2410.19258, 3.1), but not its prompts or answers: docs/headkv.md lists what differs."""


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

    Args:
        tokenizer: from `kvjax.load_tokenizer`.
        estimator: "retrieval", "retrieval_reasoning" or "enhanced_retrieval", for which only
            examples count that the model answers; "copying", for models that cannot answer
            questions; or "gradient", the sensitivity of the loss of the answer. On examples of
            your own: `kvjax.headkv.score_examples`.
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
    """The scores with what they were measured on in their meta companion."""
    origin: dict[str, Any] = {"model": model_name(model), "seed": grid.seed, "length": grid.length}
    if grid.haystack is not None:
        origin["haystack"] = grid.haystack.name
    return HeadScores(scores.samples, scores.meta | origin)


def model_name(model: Transformer) -> str:
    """The checkpoint's name, not where it lies."""
    return Path(model.config.source).name


def make_examples(tokenizer: Any, grid: Grid) -> list[Example]:
    """The grid of lengths and depths that `score_heads` asks; see `score_heads` for Raises."""
    if grid.estimator not in QUESTIONS:
        raise ValueError(f"estimator is {grid.estimator!r}, expected one of {', '.join(QUESTIONS)}")
    check_ranges(vars(grid), RANGES)
    vocab = TokenizerVocabulary(tokenizer)
    filler = None if grid.haystack is None else haystack.read(grid.haystack, vocab)
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
    """The sample at this place of the grid, in no fewer tokens than its facts and some filler."""
    ask = QUESTIONS[grid.estimator]
    facts = ask(copy.deepcopy(rng), vocab, None, index, depth, filler)
    shortest = len(facts.prompt) + LEAST_HAYSTACK
    if grid.length < shortest:
        raise ValueError(
            f"got length {grid.length}, expected ≥ {shortest} for facts, question and some filler"
        )
    length = grid.length * (index % LENGTHS + 1) // LENGTHS
    return ask(rng, vocab, max(length, shortest), index, depth, filler)
