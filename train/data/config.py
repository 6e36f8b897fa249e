"""Settings of the data of a run; checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvjax.checks import COUNT, POSITIVE, SEED, Range, optional, out_of_range
from train.data.formats import FORMATS

TEMPLATES = ("auto", "chat")
LEARN = ("answers", "all")
LONG_ROWS = ("drop", "truncate")
CHOICES = {"template": TEMPLATES, "learn": LEARN, "long_rows": LONG_ROWS}
RANGES = {
    "sequence_length": Range(least=2, most=2**31 - 1, whole=True),
    "batch_size": COUNT,
    "epochs": POSITIVE,
    "seed": SEED,
    "max_rows": optional(COUNT),
}
"""Ranges of the numbers of a `DataConfig`."""


@dataclass(frozen=True)
class SourceConfig:
    """One file or hub dataset.

    Attributes:
        path: a local file or a hub dataset, see `kvjax.data_files.open_rows`.
        format: how rows are read, one of `train.data.formats.FORMATS`.
        weight: share of the run's documents from this source, relative to the weights of the other
            sources and whatever its size. Ratios to the smallest weight are exact to one percent.
        split: of a hub dataset; a local file is read whole.

    Raises:
        ValueError: an unknown format, or a weight that is not positive.
    """

    path: str
    format: str
    weight: float = 1.0
    split: str = "train"

    def __post_init__(self) -> None:
        problems = out_of_choice(vars(self), {"format": tuple(FORMATS)})
        problems += out_of_range(vars(self), {"weight": POSITIVE})
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class DataConfig:
    """All data of a run, and how batches are made from it.

    Attributes:
        sources: mixed document by document in the ratio of their weights.
        sequence_length: T, tokens of a packed row; a document never spans two.
        batch_size: rows of the global batch, over all processes.
        template: "auto" puts a row into the prompt of its format, and a chat into the tokenizer's
            chat template; "chat" puts questions and answers into the chat template too.
        learn: the loss counts the tokens of "answers", or "all" tokens.
        epochs: the run has epochs × (rows kept in all sources) documents. A source is seen
            epochs · share · (rows of all sources) / (rows of the source) times, where share is its
            weight over the sum of weights. With one source, or weights in proportion to the sizes,
            that is `epochs` times. Every pass over a source has another order.
        seed: of all orders.
        long_rows: rows of more than T tokens are "drop"ped (and counted) or "truncate"d to T.
        max_rows: reads at most this many rows of each source, from its beginning; None: all.

    Raises:
        ValueError: no source, an unknown choice, or a number out of its range.
    """

    sources: tuple[SourceConfig, ...]
    sequence_length: int = 1024
    batch_size: int = 16
    template: str = "auto"
    learn: str = "answers"
    epochs: float = 2
    seed: int = 0
    long_rows: str = "drop"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty, expected at least one")
        problems = out_of_choice(vars(self), CHOICES) + out_of_range(vars(self), RANGES)
        if problems:
            raise ValueError("; ".join(problems))


def out_of_choice(values: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """A sentence about each setting whose value is not one of its choices."""
    return [
        f"{name} is {values[name]!r}, expected one of {', '.join(map(str, expected))}"
        for name, expected in choices.items()
        if values[name] not in expected
    ]
