"""What the data of a run is. Plain data, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.data.formats import FORMATS

TEMPLATES = ("auto", "chat")
LEARN = ("answers", "all")
LONG_ROWS = ("drop", "truncate")


@dataclass(frozen=True)
class SourceConfig:
    """One file or hub dataset.

    Attributes:
        path: a local .jsonl, .json, .parquet or .txt file, all but parquet also as .gz or .xz;
            or a hub dataset, "org/name" or "org/name:subset", which needs the `datasets` package.
        format: how its rows are read, one of `train.data.formats.FORMATS`.
        weight: share of the run's documents that come from here, relative to the other sources'
            weights, whatever the sizes. The ratio to the smallest weight is kept to one percent
            of it.
        split: of a hub dataset; a local file is taken whole.

    Raises:
        ValueError: an unknown format, or a weight that is not positive.
    """

    path: str
    format: str
    weight: float = 1.0
    split: str = "train"

    def __post_init__(self) -> None:
        _one_of("format", self.format, tuple(FORMATS))
        _positive("weight", self.weight)


@dataclass(frozen=True)
class DataConfig:
    """All the data of a run, and how it becomes batches.

    Attributes:
        sources: mixed document by document in the ratio of their weights.
        sequence_length: T, tokens of a packed row; a document never spans two.
        batch_size: rows of the global batch, over all processes.
        template: "auto" puts a row into its format's own prompt, or a chat into the tokenizer's
            chat template; "chat" puts questions and answers into the chat template too.
        learn: "answers", or "all" tokens.
        epochs: the run has epochs × (rows kept in all sources) documents. One source, or several
            whose weights are as their sizes: each row is seen this often. Otherwise a source is
            seen epochs · share · (rows of all) / (its own rows) times, where share is its weight
            over the sum of weights. Each pass over a source has an order of its own.
        seed: of every order.
        long_rows: rows of more than T tokens are "drop"ped (and counted) or "truncate"d to T.
        max_rows: the first so many rows of each source; None: all.

    Raises:
        ValueError: no source, a choice that is none, or a number out of its range.
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
        _one_of("template", self.template, TEMPLATES)
        _one_of("learn", self.learn, LEARN)
        _one_of("long_rows", self.long_rows, LONG_ROWS)
        _positive("batch_size", self.batch_size)
        _positive("epochs", self.epochs)
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}, expected at least 2")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.max_rows is not None:
            _positive("max_rows", self.max_rows)


def _one_of(name: str, got: str, expected: tuple[str, ...]) -> None:
    if got not in expected:
        raise ValueError(f"{name} is {got!r}, expected one of {', '.join(expected)}")


def _positive(name: str, got: float) -> None:
    if not 0 < got < math.inf:
        raise ValueError(f"{name} is {got}, expected a positive number")
