"""Finished runs, read from their folders and checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Union

from eval.predictions import CONFIG, RESULTS, check_same
from eval.task import PROTOCOLS
from kvjax.endings import say_finished
from kvjax.fields import (
    Count,
    Flag,
    Name,
    NotNegative,
    Number,
    Object,
    Says,
    Share,
    Size,
    Text,
    fits,
    object_problems,
    or_null,
    refuse,
    shown,
    words,
)
from kvjax.text_files import parse_json, read_bytes, read_object

METRICS = "metrics.jsonl"
CELL = re.compile(r"(\d+)/(\d*\.?\d+)")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: unique on the page.
        kind: "scores" (tasks, perplexity, lm-eval), "latency" or "training".
        results: content of results.json; for a training run, of config.json.
        log: lines of metrics.jsonl.
    """

    name: str
    kind: str
    results: dict[str, Any]
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The task and the model, and the run's name if it says more."""
        task, model = str(self.results.get("task", "training")), self.results.get("model", "")
        named = "" if self.name == task else f" ({self.name})"
        words = task.replace("_", " ")
        return words[:1].upper() + words[1:] + (f", {model}" if model else "") + named

    @property
    def policies(self) -> list[dict[str, Any]]:
        """The entries "policies" of results.json; empty for runs without scores."""
        return self.results.get("policies", []) if self.kind == "scores" else []


def find(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, in order. A folder without a run is searched one level deep.

    Raises:
        ValueError: no runs, folders of unfinished runs (names all of them), or a damaged file.
    """
    runs: list[Run] = []
    lacking: list[str] = []
    for path in paths:
        for folder in _folders(path):
            run = _read(folder, {run.name for run in runs})
            if run is None:
                lacking.append(str(folder))
            else:
                runs.append(run)
    if lacking:
        raise ValueError(
            f"no {RESULTS} in {', '.join(lacking)}: no finished run; repeat its command, or leave "
            "it out"
        )
    if not runs:
        raise ValueError("got no runs, expected at least one folder")
    return runs


def measured(out: Path | None, request: dict[str, Any]) -> dict[str, Any] | None:
    """The results in `out` of the same measurement, with a line that says so; None without them.

    Raises:
        ValueError: `out` holds another measurement, or a damaged file.
    """
    if out is None or not (out / CONFIG).exists():
        return None
    check_same(out / CONFIG, request)
    if not (out / RESULTS).exists():
        return None
    (run,) = find([out])
    say_finished(out)
    return run.results


def cells(groups: dict[str, Any]) -> dict[tuple[int, float], dict[str, Any]] | None:
    """(length, depth) → score of groups named "LENGTH/DEPTH"; None where a name differs."""
    found = {}
    for name, part in groups.items():
        match = CELL.fullmatch(name)
        if match is None:
            return None
        found[int(match[1]), float(match[2])] = part
    return found or None


def _folders(path: Path) -> list[Path]:
    names = (CONFIG, RESULTS, METRICS)
    if path.is_file() or any((path / name).exists() for name in names):
        return [path]
    children = sorted(path.iterdir()) if path.is_dir() else []
    return [c for c in children if any((c / name).exists() for name in names)] or [path]


def _read(path: Path, taken: set[str]) -> Run | None:
    """The run, or None where it has no results."""
    name = path.stem if path.is_file() else path.resolve().name
    stem, number = name, 2
    # Pictures and headings are named after runs, so names must be unique.
    while name in taken:
        name, number = f"{stem} ({number})", number + 1
    if path.is_file():
        return Run(name, "training", {}, _lines(path))
    if (path / RESULTS).exists():
        results = read_object(path / RESULTS)
        kind = "latency" if "rows" in results else "scores"
        _check(path / RESULTS, results, kind)
        return Run(name, kind, results)
    if (path / METRICS).exists():
        config = read_object(path / CONFIG) if (path / CONFIG).exists() else {}
        refuse(of_training(config), str(path / CONFIG))
        return Run(name, "training", config, _lines(path / METRICS))
    return None


def _check(path: Path, results: dict[str, Any], kind: str) -> None:
    """Raises ValueError where an entry lacks a value that the page shows, or has a wrong one."""
    entries = results.get("rows" if kind == "latency" else "policies")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no policies and no rows: not the results of a run")
    found = (of_latency if kind == "latency" else of_scores)(results)
    refuse(found, str(path))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log with a step and a loss. An unfinished last line is left out.

    Raises:
        ValueError: other lines that are damaged, or none with a step and a loss.
    """
    texts = read_bytes(path).splitlines()
    lines: list[dict[str, Any]] = []
    wrong: list[str] = []
    for index, text in enumerate(texts, 1):
        try:
            line = parse_json(text, f"line {index}")
        except ValueError as error:
            # A kill can tear the last line only; damage elsewhere is an error.
            wrong += [str(error)] if index < len(texts) else []
            continue
        if isinstance(line, dict) and {"step", "loss"} <= line.keys():
            wrong += [f"line {index}: {problem}" for problem in of_line(line)]
            lines.append(line)
    refuse(wrong, str(path))
    if not lines:
        raise ValueError(f"{path} has no lines with a step and a loss: no training log")
    return lines


ABOUT = {
    **dict.fromkeys(("task", "model", "metric", "protocol", "command"), or_null(Text)),
    "versions": or_null(Object),
    "items": or_null(Size),
    "seconds": or_null(NotNegative),
}
"""Fields of results.json that the page shows; others are ignored, here and below."""
BYTES = dict.fromkeys(("cache_bytes", "full_cache_bytes", "gqa_cache_bytes"), or_null(NotNegative))
ENTRY = {"policy": Name, "all": Object}
PARTS = {"groups": Object, "kept": Object, "summary": Object, "truncated": or_null(Size)}
ROW = {"policy": Name, "context": Count, "batch": Count, "cache_bytes": NotNegative}
TIMES = dict.fromkeys(
    ("time_to_first_token", "time_per_token", "device_peak_bytes"), or_null(NotNegative)
)
LINE = {"step": Size, "loss": Number}
Finite: Any = Union[Number, Text, Flag, Object, list, None]  # noqa: UP007
Table = Annotated[list[list[Size]], Says("[layers][heads] of numbers of tokens")]


def of_scores(results: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the results.json of a run with scores.

    Scores of tasks are shares from 0 to 1; perplexities and the harness's scores may be larger.
    """
    yield from of_config(results)
    share = results.get("protocol") in PROTOCOLS
    for entry in results["policies"]:
        found = list(object_problems(entry, ENTRY, "an entry's ", {**PARTS, **BYTES}))
        yield from found
        if found:
            continue
        at = f"{entry['policy']}: "
        yield from _score(entry["all"], f"{at}all.", share)
        for name, part in entry.get("groups", {}).items():
            yield from _score(part, f"{at}groups.{name}.", share)
        for bucket, table in entry.get("kept", {}).items():
            if not bucket.isdecimal() or not fits(table, Table):
                yield f"{at}kept.{bucket} is {shown(table)}, expected {words(Table)}"
        summary = entry.get("summary", {})
        yield from object_problems(summary, dict.fromkeys(summary, Finite), f"{at}summary.")


def of_latency(results: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the results.json of a latency run."""
    yield from of_config(results)
    for index, row in enumerate(results["rows"], 1):
        yield from object_problems(row, ROW, f"row {index}: ", {**TIMES, **BYTES, **ROW})


def of_config(values: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the values that every run has."""
    yield from object_problems(values, {}, optional=ABOUT)


def of_training(config: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a training run's config.json; its training settings are not checked."""
    shown = ("command", "versions")
    yield from object_problems(config, {}, optional={name: ABOUT[name] for name in shown})


def of_line(line: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a line of a training log."""
    yield from object_problems(line, LINE, optional={"learning_rate": or_null(NotNegative)})


def _score(part: Any, at: str, share: bool) -> Iterator[str]:
    kinds = {"score": Share if share else Number, "standard_error": or_null(NotNegative)}
    yield from object_problems(part, kinds, at, {"items": or_null(Size)})
