"""The examples that head importance is measured on, in the tokens of a model's tokenizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.encoding import ids_after
from kvjax.example import Example
from kvjax.ranges import COUNT, SEED, check_ranges
from kvjax.tasks import needle, repeated_spans, two_hop
from kvjax.tasks.prompt import Filler, read_haystack

LENGTHS = 4  # prompt lengths of the grid, evenly up to the longest
LEAST_HAYSTACK = 16  # tokens of filler in the shortest prompt
COPIED_LENGTH = 64  # steps of the copying estimator: with fewer the ranking is less stable
DISTRACTORS = 3  # 0, 1 and 2 in turn
RANGES = {"samples": COUNT, "length": COUNT, "seed": SEED}
"""The numbers of a `Grid`."""


@dataclass(frozen=True)
class TokenizerVocabulary:
    """A transformers tokenizer as the vocabulary of the tasks."""

    tokenizer: Any

    @property
    def bos_id(self) -> int | None:
        """The token that starts a prompt, if the tokenizer has one."""
        return self.tokenizer.bos_token_id

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text as it stands within a sentence: after a space."""
        return ids_after(self.tokenizer, f" {text}")

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """All ids but those of special and added tokens."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [index for index in range(self.size) if index not in special]


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


def make_examples(tokenizer: Any, grid: Grid) -> list[Example]:
    """The grid of lengths and depths that `score_heads` asks; see `score_heads` for Raises."""
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
