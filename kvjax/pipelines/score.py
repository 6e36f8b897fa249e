"""Head importance of a checkpoint, measured on examples that are generated for its tokenizer."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax.example import Example
from kvjax.headkv.batches import bucketed
from kvjax.headkv.importance import BatchScores, score_examples
from kvjax.headkv.scores import HeadScores
from kvjax.headkv.stability import split_half
from kvjax.hf import load, load_tokenizer
from kvjax.nn import Transformer
from kvjax.pipelines import partial
from kvjax.tasks import haystack, needle, repeated_spans, two_hop
from kvjax.tasks.prompt import Filler

LENGTHS = 4  # prompt lengths of the grid, evenly up to the longest
LEAST_HAYSTACK = 16  # tokens of filler in the shortest prompt
COPIED_LENGTH = 64  # steps of the copying estimator: with fewer the ranking is less stable
DISTRACTORS = 3  # 0, 1 and 2 in turn


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
        return self.tokenizer.encode(f" {text}", add_special_tokens=False)

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
"""What each estimator asks: the first three as in the HeadKV paper (arXiv 2410.19258, 3.1)."""


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
    path = None if haystack is None else Path(haystack)
    grid = Grid(estimator, samples, length, seed, path)
    examples = make_examples(tokenizer, grid)
    scores = score_examples(model, params, examples, estimator=estimator, batch_size=batch_size)
    return with_origin(scores, model, grid)


def make_examples(tokenizer: Any, grid: Grid) -> list[Example]:
    """The grid of lengths and depths that `score_heads` asks; see `score_heads` for Raises."""
    if grid.estimator not in QUESTIONS:
        raise ValueError(f"estimator is {grid.estimator!r}, expected one of {', '.join(QUESTIONS)}")
    if grid.samples < 1:
        raise ValueError(f"got {grid.samples} samples, expected ≥ 1")
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


def with_origin(scores: HeadScores, model: Transformer, grid: Grid) -> HeadScores:
    """The scores with what they were measured on in their meta companion."""
    origin: dict[str, Any] = {"model": model_name(model), "seed": grid.seed, "length": grid.length}
    if grid.haystack is not None:
        origin["haystack"] = grid.haystack.name
    return HeadScores(scores.samples, scores.meta | origin)


def model_name(model: Transformer) -> str:
    """The checkpoint's name, not where it lies."""
    return Path(model.config.source).name


def score_checkpoint(
    path: str, out: Path, grid: Grid, batch_size: int = 8, dtype: str = "float32"
) -> dict[str, Any]:
    """Scores the checkpoint at `path` and writes the score file `out`.

    Finished batches are kept beside `out` until it is written: the same call after an interruption
    goes on where it stopped, and writes the same file.

    Returns:
        estimator, examples accepted and asked, the most important head, split-half stability,
        seconds.

    Raises:
        ValueError: see `score_heads`; or an unfinished run with other settings has the same `out`.
    """
    start = time.monotonic()
    model, params = load(path, dtype=dtype)
    examples = make_examples(load_tokenizer(path), grid)
    total = len(bucketed(examples, batch_size))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial.partial_path(out)
    finished = partial.resume(unfinished, request(model, grid, examples, batch_size, dtype))
    with progress_bar() as progress:
        task = progress.add_task("head importance", total=total, completed=len(finished))

        def on_batch(batch: BatchScores) -> None:
            partial.append(unfinished, batch)
            progress.advance(task)

        try:
            scores = score_examples(
                model, params, examples, grid.estimator, batch_size, finished, on_batch
            )
        except (ValueError, NotImplementedError):
            unfinished.unlink()  # an answer, if not the one hoped for: nothing to go on with
            raise
    scores = with_origin(scores, model, grid)
    scores.save(out)
    unfinished.unlink()
    layer, head = np.unravel_index(int(scores.mean.argmax()), scores.mean.shape)
    return {
        "estimator": grid.estimator,
        "accepted": scores.samples.shape[2],
        "asked": grid.samples,
        "best_head": f"layer {layer} head {head}",
        "best_score": round(float(scores.mean.max()), 4),
        "split_half_spearman": _rounded(split_half(scores)),
        "seconds": round(time.monotonic() - start, 1),
    }


def request(
    model: Transformer, grid: Grid, examples: Sequence[Example], batch_size: int, dtype: str
) -> dict[str, Any]:
    """All that the batches of a run depend on, as JSON values."""
    digest = hashlib.sha256(repr([(e.prompt, e.answer, e.span) for e in examples]).encode())
    return {
        "model": model_name(model),
        "estimator": grid.estimator,
        "samples": grid.samples,
        "length": grid.length,
        "seed": grid.seed,
        "haystack": None if grid.haystack is None else grid.haystack.name,
        "batch_size": batch_size,
        "dtype": dtype,
        "examples": digest.hexdigest()[:12],
    }


def progress_bar() -> Progress:
    """Batches done of how many, and the time that the rest takes; gone when finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    return Progress(
        *columns,
        TextColumn("batches, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
