"""`kvjax score`: importance or need of a checkpoint's heads, and how an interrupted run continues.

Finished batches are in a file of JSON lines beside the result until the result is written. The
first line is the request; each further line is one batch. A last line that was not written to its
end is cut off, and its batch is measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvjax.commands.unfinished import REPEAT
from kvjax.endings import say_finished
from kvjax.example import Example
from kvjax.fields import Size, hints, object_problems, refuse, within
from kvjax.headkv.examples import NEED, Grid, bucketed, check_length, make_examples
from kvjax.headkv.measure import BatchImportance, model_name, score_examples, with_origin
from kvjax.headkv.need import BatchNeed, measure_need
from kvjax.hf import default_dtype, load, load_tokenizer, read_model
from kvjax.identity import array_digest, identity
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores, beside, load_scores, split_half
from kvjax.policies.need import NeedCurves, load_need, need_path
from kvjax.progress import progress_bar, stage
from kvjax.runs import append_lines, check_same, cut_torn_line, whole_lines
from kvjax.text_files import parse_object


class Measurement(NamedTuple):
    """What a run measures.

    Attributes:
        batch: type of its batches, a dataclass of indices and arrays.
        measure: (model, params, examples, grid, batch_size, finished, on_batch) → the result.
        facts: the facts of a result that the command prints.
        path: the file of the result, for the file that the command names.
        read: reads that file.
    """

    batch: type
    measure: Callable[..., HeadScores | NeedCurves]
    facts: Callable[[Any], dict[str, Any]]
    path: Callable[[Path], Path]
    read: Callable[[Path], HeadScores | NeedCurves]


def score_checkpoint(
    path: str,
    out: Path,
    grid: Grid,
    batch_size: int = 8,
    dtype: str | None = None,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Measures the heads of the checkpoint at `path`: their importance, or their curves of need.

    Importance goes into the score file `out`, curves go into NAME.need.json beside it. If a run was
    interrupted, the same call continues after the last finished batch and writes the same file. If
    the file is there, made by the same call, its content is the result.

    Args:
        grid: the examples, and what is measured on them.
        batch_size: examples at a time.
        dtype: of weights and activations; None: see `kvjax.hf.default_dtype`.
        mesh: devices to shard over, see `kvjax.mesh.parse_mesh`; None for one device.

    Returns:
        Estimator, examples asked, the head that matters most, and seconds; for importance also
        examples accepted and split-half stability.

    Raises:
        ValueError: see `score_heads`, `measure_need`; or an unfinished run with other settings has
            the same `out`.
    """
    start, dtype = time.monotonic(), dtype or default_dtype()
    wanted = NEED_CURVES if grid.estimator == NEED else IMPORTANCE
    out = wanted.path(out)
    # Everything that can be refused is, before the weights are read.
    check_length(grid.length, read_model(path).config)
    examples = make_examples(load_tokenizer(path), grid)
    total = len(bucketed(examples, batch_size))
    with stage(f"loading {path}"):
        model, params = load(path, dtype=dtype, mesh=named_mesh(mesh))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = partial_path(out)
    weights = {"weights": identity(model.config, params).digest}
    asked = request(model, grid, examples, batch_size, dtype) | weights
    if (earlier := _made(out, asked, wanted)) is not None:
        unfinished.unlink(missing_ok=True)  # a kill may have come after the result was written
        say_finished(out)
        return _report(earlier, wanted, grid, start)
    finished = finished_batches(unfinished, asked, wanted.batch)
    # Measure the rest; every batch is on disk before the next one starts.
    with progress_bar() as progress:
        task = progress.add_task(
            f"heads: {grid.estimator}", total=total, completed=len(finished), items=""
        )

        def on_batch(batch: Any) -> None:
            append_batch(unfinished, batch)
            progress.advance(task)

        try:
            rest = grid, batch_size, finished, on_batch
            result = wanted.measure(model, params, examples, *rest)
        except (ValueError, NotImplementedError):
            # The same command would fail in the same way: there is nothing to continue.
            unfinished.unlink()
            raise
    result.meta.update(weights, request=asked, digest=_digest(result))
    result.save(out)
    unfinished.unlink()
    return _report(result, wanted, grid, start)


def _made(out: Path, asked: dict[str, Any], wanted: Measurement) -> HeadScores | NeedCurves | None:
    """The result in a file that a run with this request wrote; None for any other file."""
    try:
        found = wanted.read(out)
    except ValueError:  # no such file, or one of another kind, which a run replaces
        return None
    # A kill between scores and meta file leaves an old one of them.
    same = found.meta.get("request") == asked and found.meta.get("digest") == _digest(found)
    return found if same else None


def _digest(result: HeadScores | NeedCurves) -> str:
    return array_digest(result.samples if isinstance(result, HeadScores) else result.rises)


def _report(
    result: HeadScores | NeedCurves, wanted: Measurement, grid: Grid, start: float
) -> dict[str, Any]:
    facts = {"estimator": grid.estimator, "asked": grid.samples, **wanted.facts(result)}
    return facts | {"seconds": round(time.monotonic() - start, 1), "notes": _notes(facts)}


def _notes(facts: Mapping[str, Any]) -> list[str]:
    """What a user should know about the scores."""
    accepted = facts.get("accepted", FEW)
    if accepted >= FEW:
        return []
    return [
        f"the model answered {accepted} of {facts['asked']} prompts, and only these count: scores "
        "of so few are noise; ask shorter ones (--length), more (--samples), or take --estimator "
        "copying, which needs no answers"
    ]


def measure_importance(model, params, examples, grid: Grid, *rest: Any) -> HeadScores:
    """The importance of every query head, by the grid's estimator."""
    scores = score_examples(model, params, examples, grid.estimator, *rest)
    return with_origin(scores, model, grid)


def importance_facts(scores: HeadScores) -> dict[str, Any]:
    return {
        "accepted": scores.samples.shape[2],
        **_best(scores.mean),
        "split_half": _rounded(split_half(scores)),
    }


def measure_curves(
    model, params, examples, grid: Grid, batch_size: int, finished, on_batch
) -> NeedCurves:
    """The curve of need of every KV head."""
    resumed = {"batch_size": batch_size, "finished": finished, "on_batch": on_batch}
    return with_origin(measure_need(model, params, examples, **resumed), model, grid)


def curve_facts(curves: NeedCurves) -> dict[str, Any]:
    return _best(curves.rises[..., 0])


def _best(values: np.ndarray) -> dict[str, Any]:
    """The head with the largest value."""
    layer, head = np.unravel_index(int(values.argmax()), values.shape)
    return {
        "best_head": f"layer {layer} head {head}",
        "best_score": round(float(values.max()), 4),
    }


FEW = 8
"""Prompts whose mean says little."""
IMPORTANCE = Measurement(
    BatchImportance, measure_importance, importance_facts, lambda out: out, load_scores
)
NEED_CURVES = Measurement(BatchNeed, measure_curves, curve_facts, need_path, load_need)


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


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def partial_path(out: Path) -> Path:
    """heads.json or heads.json.gz -> heads.partial.jsonl."""
    return beside(out, ".partial.jsonl")


def finished_batches(path: Path, request: dict[str, Any], kind: type) -> list[Any]:
    """Reads the finished batches. Creates the file if there is none, so `append_batch` can follow.

    Args:
        request: everything that the batches depend on.
        kind: type of the batches.

    Raises:
        ValueError: the file belongs to another request.
    """
    # A kill tears the last line at most: cut it off, or the next batch would be written after it.
    cut_torn_line(path)
    lines = whole_lines(path)
    if not lines:
        append_lines(path, [request])
        return []
    advice = "remove the file to start over"
    with within(f"{path} is not a file of finished batches; {advice}"):
        header = parse_object(lines[0], "line 1")
        batches = [_batch(line, f"line {i}", kind) for i, line in enumerate(lines[1:], 2)]
    held = f"{path} holds an unfinished run with other settings"
    check_same(header, request, held, f"{REPEAT}, or {advice}")
    return batches


def append_batch(path: Path, batch: Any) -> None:
    """Adds one finished batch."""
    append_lines(path, [{name: np.asarray(value).tolist() for name, value in vars(batch).items()}])


def _batch(line: bytes, where: str, kind: type) -> Any:
    held = parse_object(line, where)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "indices"]
    kinds = {"indices": list[Size], **dict.fromkeys(names, list)}
    refuse(object_problems(held, kinds, others=False), where)
    try:
        arrays = {name: np.asarray(held[name], np.float64) for name in names}
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None
    for name, array in arrays.items():
        axes = hints(kind)[name].dim_str.split()  # such as "n L N", for n examples
        if array.ndim != len(axes) or len(array) != len(held["indices"]):
            raise ValueError(
                f"{where}: {name} has shape {array.shape}, expected [{', '.join(axes)}] with "
                f"{len(held['indices'])} first"
            )
    return kind(indices=tuple(held["indices"]), **arrays)
