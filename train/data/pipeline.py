"""Documents → batches: shuffle, mix, pack, batch; and a summary of what was kept.

All steps are grain's, so that the iterator over batches has a state that a checkpoint can hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.extras import import_extra
from train.data.config import DataConfig
from train.data.documents import Documents, open_documents

if TYPE_CHECKING:
    import grain

BINS = 64
"""Number of rows that are packed at the same time.

More rows leave fewer gaps, but a state is restored more slowly: these rows are packed again."""


def make_loader(
    config: DataConfig, tokenizer: Any, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """One process's share of the batches of packed documents.

    Row i of the data belongs to process i mod process_count for the whole run, and all processes
    have the same number of batches. The same arguments give the same batches. The first call reads
    and encodes all rows; later calls with the same data don't.

    Args:
        config: of the data.
        tokenizer: of transformers.
        process_index, process_count: jax.process_index(), jax.process_count().

    Returns:
        A dataset; `iter` of it has `get_state` and `set_state` (a nested dict of integers).
        An element is a dict, b = batch_size / process_count, T = sequence_length:
        tokens int32 [b, T], 0 at padding; targets int32 [b, T], the next token of the same
        document, 0 where there is none; positions int32 [b, T], from 0 in every document, −1 at
        padding; segment_ids int32 [b, T], 1, 2, … for the documents of a row, 0 at padding;
        weights float32 [b, T], 1 where the target is learned and 0 elsewhere.

    Raises:
        ValueError: bad data (by file and line), processes that don't divide the batch, or too
            little data for one batch.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, expected 0 to {process_count - 1}")
    batches = count_batches(config, tokenizer, process_count)
    sources = open_documents(config, tokenizer)
    documents = _mix(config, sources, process_index, process_count)
    rows = _pack(config, documents, ("tokens", "learned"))
    packed = rows.batch(config.batch_size // process_count, drop_remainder=True).map(_shift)
    return import_extra("grain.experimental", "train").LimitIterDataset(packed, batches)


def count_batches(config: DataConfig, tokenizer: Any, process_count: int = 1) -> int:
    """Number of batches in all epochs: the exact length of the loader.

    Counted by packing documents of the same lengths. Rows that don't fill a batch at the end are
    left out. The process with the fewest batches decides for all.

    Raises:
        ValueError: as in `make_loader`.
    """
    if process_count < 1 or config.batch_size % process_count:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of the "
            f"{process_count} processes"
        )
    return _count(config, open_documents(config, tokenizer), process_count)


def epochs_for(
    config: DataConfig, tokenizer: Any, steps: int, process_count: int = 1
) -> DataConfig:
    """The data with enough epochs for so many batches.

    Raises:
        ValueError: as `count_batches`.
    """
    once = count_batches(dataclasses.replace(config, epochs=1), tokenizer, process_count)
    # One more epoch: packing may leave slightly fewer rows in some epochs.
    return dataclasses.replace(config, epochs=math.ceil(steps / once) + 1)


@functools.lru_cache(maxsize=8)
def _count(config: DataConfig, sources: tuple[Documents, ...], process_count: int) -> int:
    # Packing depends on lengths only: pack arrays without content.
    lengths = [_Lengths(source) for source in sources]
    rows = [
        sum(1 for _ in _pack(config, _mix(config, lengths, index, process_count), ("tokens",)))
        for index in range(process_count)
    ]
    batches = min(rows) // (config.batch_size // process_count)
    if batches == 0:
        raise ValueError(
            f"the data fill {min(rows)} rows of {config.sequence_length} tokens on a process, "
            f"expected at least {config.batch_size // process_count}, one batch: lower batch_size "
            "or sequence_length, or take more data or epochs"
        )
    return batches


class _Lengths:
    """Stands in for documents: arrays of zeros with the same lengths, without memory."""

    def __init__(self, documents: Documents):
        self.path = documents.path
        self.lengths = documents.lengths.tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.broadcast_to(np.int8(0), self.lengths[index])}


def _mix(
    config: DataConfig, sources: Sequence[Any], process_index: int, process_count: int
) -> grain.MapDataset:
    """All documents of a run on one process, shuffled and mixed by the sources' weights."""
    grain = import_extra("grain", "train")
    parts, rows = [], 0
    for index, source in enumerate(sources):
        if len(source) < process_count:
            raise ValueError(
                f"{source.path}: got {len(source)} usable rows, expected at least one for each of "
                f"the {process_count} processes"
            )
        # A slice for each process before shuffling: no row is seen by two processes.
        part = grain.MapDataset.source(source)[process_index::process_count]
        rows += len(part)
        # Another seed for each source; `repeat` shuffles every pass differently.
        seed = np.random.SeedSequence([config.seed, index]).generate_state(1)[0]
        parts.append(part.shuffle(seed=int(seed)).repeat())
    weights = [source.weight for source in config.sources]
    return grain.MapDataset.mix(parts, weights)[: max(1, round(config.epochs * rows))]


def _pack(
    config: DataConfig, documents: grain.MapDataset, features: tuple[str, ...]
) -> grain.IterDataset:
    """Packs documents into rows of T tokens."""
    grain = import_extra("grain", "train")
    # No threads: a tokenizer's settings are not safe to change from several threads.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return grain.experimental.FirstFitPackIterDataset(
        stream,
        length_struct=dict.fromkeys(features, config.sequence_length),
        num_packing_bins=max(BINS, config.batch_size),
        seed=config.seed % 2**32,
    )


def _shift(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds targets and weights: the next token of the same document, and whether it is learned."""
    # A token has a target if the next token belongs to the same document; 0 marks padding.
    tokens, ids = packed["tokens"], packed["tokens_segment_ids"]
    has_next = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    targets[:, :-1] = np.where(has_next, tokens[:, 1:], 0)
    weights[:, :-1] = has_next & packed["learned"][:, 1:]
    positions = np.where(ids > 0, packed["tokens_positions"], np.int32(-1))
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segment_ids": ids,
        "weights": weights,
    }


@dataclass(frozen=True)
class SourceSummary:
    """Counts of one source; each row is counted once.

    Attributes:
        path: as in its config.
        rows: number of rows read.
        too_long: number of rows of more than sequence_length tokens, dropped or cut.
        dropped: number of rows left out: too long, or without a learned token.
        tokens: number of tokens in the kept rows.
        learned_tokens: number of these tokens that the loss counts.
        epochs: average number of times that the run sees a kept row.
    """

    path: str
    rows: int
    too_long: int
    dropped: int
    tokens: int
    learned_tokens: int
    epochs: float


@dataclass(frozen=True)
class Summary:
    """Counts of all sources, and the number of batches of the run."""

    sources: tuple[SourceSummary, ...]
    batches: int

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def dropped(self) -> int:
        return sum(source.dropped for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def learned_tokens(self) -> int:
        return sum(source.learned_tokens for source in self.sources)

    def __str__(self) -> str:
        lines = [
            f"{source.path}: {source.rows} rows, {source.too_long} too long, "
            f"{source.dropped} dropped; {source.tokens} tokens, {source.learned_tokens} learned; "
            f"seen {source.epochs:.2f} times"
            for source in self.sources
        ]
        return "\n".join([*lines, f"{self.batches} batches"])


def summary(config: DataConfig, tokenizer: Any, process_count: int = 1) -> Summary:
    """Counts of rows, tokens and batches.

    Raises:
        ValueError: as in `make_loader`.
    """
    sources = open_documents(config, tokenizer)
    weights = [source.weight for source in config.sources]
    # Sources are mixed by weight: share of the run's documents, divided by the source's rows.
    documents = config.epochs * sum(map(len, sources))
    found = tuple(
        SourceSummary(
            path=source.path,
            rows=source.rows,
            too_long=source.too_long,
            dropped=source.dropped,
            tokens=int(source.lengths.sum()),
            learned_tokens=int(source.learned.sum()),
            epochs=documents * weight / sum(weights) / len(source),
        )
        for source, weight in zip(sources, weights, strict=True)
    )
    return Summary(found, count_batches(config, tokenizer, process_count))
