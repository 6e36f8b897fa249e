"""Settings of the data of a run; checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from kvjax.checks import COUNT, POSITIVE, Range
from kvjax.fields import Count, OneOf, Positive, Seed, check_fields
from train.data.formats import FORMATS

Template = Literal["auto", "chat"]
Learn = Literal["answers", "all"]
LongRows = Literal["drop", "truncate"]
RowLength = Annotated[int, Range(least=2, most=COUNT.most, whole=True)]
Epochs = Annotated[int, POSITIVE]
"""Flags take whole numbers; Python and YAML take halves too."""


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
    format: Annotated[str, OneOf(tuple(FORMATS))]
    weight: Positive = 1.0
    split: str = "train"

    def __post_init__(self) -> None:
        check_fields(self)


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
    sequence_length: RowLength = 1024
    batch_size: Count = 16
    template: Template = "auto"
    learn: Learn = "answers"
    epochs: Positive = 2
    seed: Seed = 0
    long_rows: LongRows = "drop"
    max_rows: Count | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty, expected at least one")
        check_fields(self)
