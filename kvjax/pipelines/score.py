"""Head importance of a checkpoint, measured on examples that are generated for its tokenizer."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax.example import Example
from kvjax.headkv.examples import bucketed
from kvjax.headkv.measure import BatchScores, score_examples
from kvjax.hf import load, load_tokenizer
from kvjax.identity import identity
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.pipelines import partial
from kvjax.pipelines.questions import Grid, make_examples
from kvjax.policies.importance import HeadScores, split_half


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


def score_checkpoint(
    path: str,
    out: Path,
    grid: Grid,
    batch_size: int = 8,
    dtype: str = "float32",
    mesh: str | None = None,
) -> dict[str, Any]:
    """Scores the checkpoint at `path` and writes the score file `out`.

    Finished batches are kept beside `out` until it is written: the same call after an interruption
    goes on where it stopped, and writes the same file.

    Args:
        mesh: devices to spread over, see `kvjax.mesh.parse_mesh`; None for one.

    Returns:
        estimator, examples accepted and asked, the most important head, split-half stability,
        seconds.

    Raises:
        ValueError: see `score_heads`; or an unfinished run with other settings has the same `out`.
    """
    start = time.monotonic()
    model, params = load(path, dtype=dtype, mesh=named_mesh(mesh))
    examples = make_examples(load_tokenizer(path), grid)
    total = len(bucketed(examples, batch_size))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial.partial_path(out)
    weights = identity(model.config, params).digest
    wanted = request(model, grid, examples, batch_size, dtype) | {"weights": weights}
    finished = partial.resume(unfinished, wanted)
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
        "split_half": _rounded(split_half(scores)),
        "seconds": round(time.monotonic() - start, 1),
    }


def request(
    model: Transformer, grid: Grid, examples: Sequence[Example], batch_size: int, dtype: str
) -> dict[str, Any]:
    """All that the batches of a run depend on besides the weights, as JSON values."""
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
    """Batches done of how many, and the time that the rest takes; on a terminal, until finished."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
