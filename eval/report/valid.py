"""What the files of a run must hold so that the page can show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.checks import NAME, NULL, OBJECT, TEXT, Kind, number, problems, whole
from eval.settings import PROTOCOLS

ABOUT = {
    **dict.fromkeys(("task", "model", "metric", "protocol", "command"), TEXT | NULL),
    "versions": OBJECT | NULL,
    "items": whole(0) | NULL,
    "seconds": number(0) | NULL,
}
BYTES = dict.fromkeys(("cache_bytes", "full_cache_bytes", "gqa_cache_bytes"), number(0) | NULL)
ENTRY = {"policy": NAME, "all": OBJECT}
PARTS = {"groups": OBJECT, "kept": OBJECT, "summary": OBJECT, "truncated": whole(0) | NULL}
ROW = {"policy": NAME, "context": whole(1), "batch": whole(1), "cache_bytes": number(0)}
TIMES = dict.fromkeys(
    ("time_to_first_token", "time_per_token", "device_peak_bytes"), number(0) | NULL
)
LINE = {"step": whole(0), "loss": number()}
FINITE = Kind("a finite number", lambda value: not isinstance(value, float) or number().fits(value))


def of_scores(results: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the results.json of a run with scores; shares are scores of the tasks."""
    yield from of_config(results)
    share = results.get("protocol") in PROTOCOLS
    for entry in results["policies"]:
        found = list(problems(entry, ENTRY, "an entry's ", {**PARTS, **BYTES}))
        yield from found
        if found:
            continue
        at = f"{entry['policy']}: "
        yield from _score(entry["all"], f"{at}all.", share)
        for name, part in entry.get("groups", {}).items():
            yield from _score(part, f"{at}groups.{name}.", share)
        for bucket, table in entry.get("kept", {}).items():
            if not bucket.isdecimal() or not _is_table(table):
                yield f"{at}kept.{bucket} is no table, expected tokens for a number of tokens"
        summary = entry.get("summary", {})
        yield from problems(summary, dict.fromkeys(summary, FINITE), f"{at}summary.")


def of_latency(results: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the results.json of a latency run."""
    yield from of_config(results)
    for index, row in enumerate(results["rows"], 1):
        yield from problems(row, ROW, f"row {index}: ", {**TIMES, **BYTES, **ROW})


def of_config(values: Mapping[str, Any]) -> Iterator[str]:
    """Problems of what every run says about itself."""
    yield from problems(values, {}, optional=ABOUT)


def of_training(config: Mapping[str, Any]) -> Iterator[str]:
    """Problems of the config.json of a training run, which has settings of its own besides."""
    shown = ("command", "versions")
    yield from problems(config, {}, optional={name: ABOUT[name] for name in shown})


def of_line(line: Mapping[str, Any]) -> Iterator[str]:
    """Problems of a line of a training log."""
    yield from problems(line, LINE, optional={"learning_rate": number(0) | NULL})


def _score(part: Any, at: str, share: bool) -> Iterator[str]:
    score = number(0, 1) if share else number()
    kinds = {"score": score, "standard_error": number(0) | NULL}
    yield from problems(part, kinds, at, {"items": whole(0) | NULL})


def _is_table(table: Any) -> bool:
    """Whether it is [layers][heads] of whole numbers, heads of any count in each layer."""
    return isinstance(table, Sequence) and all(
        isinstance(row, Sequence) and all(map(whole(0).fits, row)) for row in table
    )
