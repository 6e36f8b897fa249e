"""The finished batches of a measurement that may be interrupted: JSON lines beside its result.

The first line is the request; each further line is a batch. A line that was cut off while it was
written is dropped, so that the batch is measured again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.headkv.measure import BatchScores


def partial_path(out: Path) -> Path:
    """heads.json or heads.json.gz -> heads.partial.jsonl."""
    stem = out.name.removesuffix(".gz").removesuffix(".json")
    return out.with_name(f"{stem}.partial.jsonl")


def resume(path: Path, request: dict[str, Any]) -> list[BatchScores]:
    """The batches that are finished; the file is there afterwards, ready for `append`.

    Args:
        request: all that the batches depend on.

    Raises:
        ValueError: the file belongs to another request.
    """
    lines = _whole_lines(path) if path.exists() else []
    if not lines:
        _write(path, "w", request)
        return []
    try:
        header = json.loads(lines[0])
        batches = [_batch(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is no file of finished batches; remove it to start over"
        ) from None
    if header != request:
        raise ValueError(
            f"{path} holds an unfinished run with other settings ({differences(header, request)}):"
            " repeat that command to finish it, or remove the file to start over"
        )
    return batches


def append(path: Path, batch: BatchScores) -> None:
    """Adds one finished batch."""
    line = {
        "indices": batch.indices,
        "answers": batch.answers.tolist(),
        "heads": batch.heads.tolist(),
    }
    _write(path, "a", line)


def _batch(line: dict[str, Any]) -> BatchScores:
    heads = np.asarray(line["heads"], np.float64)
    return BatchScores(tuple(line["indices"]), heads, np.asarray(line["answers"], np.float64))


def _whole_lines(path: Path) -> list[bytes]:
    """Its lines, without a last one that does not end; that one is cut off the file."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    os.truncate(path, end)
    return content[:end].splitlines()


def differences(header: Any, request: dict[str, Any]) -> str:
    """What another request has set otherwise, "dtype float32, now bfloat16"."""
    got = header if isinstance(header, dict) else {}
    names = [name for name in request if got.get(name) != request[name]]
    return ", ".join(f"{name} {got.get(name)}, now {request[name]}" for name in names)


def _write(path: Path, mode: str, value: dict[str, Any]) -> None:
    # JSON keeps a float's every bit: Python writes the shortest text that reads back the same.
    with path.open(mode, encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
