"""What a task reads of the command line; whatever else is given is refused, never ignored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from eval.task import TaskOptions

APART = ("tokenizer", "settings", "seed")
"""Fields that this does not judge; a seed may be that of sampled answers."""


@dataclass(frozen=True)
class Reads:
    """What a task reads.

    Attributes:
        options: names of the fields of `TaskOptions`.
        settings: keys of `--set`.
        scoring: those of the settings that only matter where answers are decoded.
        why: the reason where a choice of options decides what is read.
    """

    options: tuple[str, ...]
    settings: tuple[str, ...] = ()
    scoring: tuple[str, ...] = ()
    why: str = ""


def check(name: str, options: TaskOptions, reads: Reads) -> None:
    """Raises ValueError that names every option and setting that the task would ignore."""
    unknown = [key for key in options.settings if key not in reads.settings]
    if unknown:
        known = f"one of {', '.join(reads.settings)}" if reads.settings else "none: it has none"
        raise ValueError(
            f"task {name}: unknown setting {', '.join(map(repr, unknown))}, "
            f"expected {known}{_why(reads)}"
        )
    given = [
        field.name
        for field in dataclasses.fields(options)
        if field.name not in (*APART, *reads.options)
        and getattr(options, field.name) != field.default
    ]
    if given:
        raise ValueError(
            f"task {name} does not read {flags(given)}, expected only {flags(reads.options)}"
            f"{_why(reads)}"
        )


def flags(names: tuple[str, ...] | list[str]) -> str:
    """Names as on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _why(reads: Reads) -> str:
    return f" ({reads.why})" if reads.why else ""
