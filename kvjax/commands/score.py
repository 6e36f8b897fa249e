"""`kvjax score`: the head importance of a checkpoint, and how an interrupted run continues.

Finished batches are in a file of JSON lines beside the result until the result is written. The
first line is the request; each further line is one batch. A last line that was not written to its
end is cut off, and its batch is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax.commands.unfinished import REPEAT
from kvjax.example import Example
from kvjax.headkv.examples import Grid, bucketed, make_examples
from kvjax.headkv.measure import BatchImportance, model_name, score_examples, with_origin
from kvjax.hf import default_dtype, load, load_tokenizer
from kvjax.identity import identity
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.policies.importance import split_half
from kvjax.runs import append_lines, check_same, cut_torn_line, whole_lines


def score_checkpoint(
    path: str,
    out: Path,
    grid: Grid,
    batch_size: int = 8,
    dtype: str | None = None,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Measures the head importance of the checkpoint at `path` and writes the score file `out`.

    If a run was interrupted, the same call continues after the last finished batch and writes the
    same file.

    Args:
        grid: the examples.
        batch_size: examples at a time.
        dtype: of weights and activations; None: see `kvjax.hf.default_dtype`.
        mesh: devices to shard over, see `kvjax.mesh.parse_mesh`; None for one device.

    Returns:
        Estimator, examples accepted and asked, the most important head, split-half stability, and
        seconds.

    Raises:
        ValueError: see `score_heads`; or an unfinished run with other settings has the same `out`.
    """
    start, dtype = time.monotonic(), dtype or default_dtype()
    # Read the model and the batches that an earlier run finished.
    model, params = load(path, dtype=dtype, mesh=named_mesh(mesh))
    examples = make_examples(load_tokenizer(path), grid)
    total = len(bucketed(examples, batch_size))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial_path(out)
    weights = identity(model.config, params).digest
    wanted = request(model, grid, examples, batch_size, dtype) | {"weights": weights}
    finished = finished_batches(unfinished, wanted)
    # Measure the rest; every batch is on disk before the next one starts.
    with progress_bar() as progress:
        task = progress.add_task("head importance", total=total, completed=len(finished))

        def on_batch(batch: BatchImportance) -> None:
            append_batch(unfinished, batch)
            progress.advance(task)

        try:
            scores = score_examples(
                model, params, examples, grid.estimator, batch_size, finished, on_batch
            )
        except (ValueError, NotImplementedError):
            # The same command would fail in the same way: there is nothing to continue.
            unfinished.unlink()
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
    """Everything except the weights that the batches of a run depend on, as JSON values."""
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
    """A bar of finished batches and the remaining time. It is shown on terminals only."""
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


def partial_path(out: Path) -> Path:
    """heads.json or heads.json.gz -> heads.partial.jsonl."""
    stem = out.name.removesuffix(".gz").removesuffix(".json")
    return out.with_name(f"{stem}.partial.jsonl")


def finished_batches(path: Path, request: dict[str, Any]) -> list[BatchImportance]:
    """Reads the finished batches. Creates the file if there is none, so `append_batch` can follow.

    Args:
        request: everything that the batches depend on.

    Raises:
        ValueError: the file belongs to another request.
    """
    # A kill tears the last line at most: cut it off, or the next batch would be written after it.
    cut_torn_line(path)
    lines = whole_lines(path)
    if not lines:
        append_lines(path, [request])
        return []
    try:
        header = json.loads(lines[0])
        batches = [_batch(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not a file of finished batches; remove it to start over"
        ) from None
    held = f"{path} holds an unfinished run with other settings"
    check_same(header, request, held, f"{REPEAT}, or remove the file to start over")
    return batches


def append_batch(path: Path, batch: BatchImportance) -> None:
    """Adds one finished batch."""
    line = {
        "indices": batch.indices,
        "answers": batch.answers.tolist(),
        "heads": batch.heads.tolist(),
    }
    append_lines(path, [line])


def _batch(line: dict[str, Any]) -> BatchImportance:
    heads = np.asarray(line["heads"], np.float64)
    return BatchImportance(tuple(line["indices"]), heads, np.asarray(line["answers"], np.float64))
