"""Documents → batches: shuffle, mix, pack, batch. All of it grain's, so an iterator has a state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from train.data.config import DataConfig
from train.data.documents import Documents, open_documents

BINS = 64
"""Rows that are packed side by side: more of them leave fewer gaps, and make a state restore
more slowly, since the packing of these rows is done again."""


def make_loader(
    config: DataConfig, tokenizer: Any, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Batches of packed documents, the share of one process.

    Every row of data belongs to one process for the whole run, row i to process
    i mod process_count, and all processes have equally many batches. The same arguments give the
    same batches. The first call reads and encodes all rows, later ones with the same data do not.

    Args:
        config: what data.
        tokenizer: of transformers.
        process_index, process_count: jax.process_index(), jax.process_count().

    Returns:
        A dataset; `iter` of it has `get_state` and `set_state` (a nested dict of integers).
        An element is a dict, b = batch_size / process_count, T = sequence_length:
        tokens int32 [b, T], 0 at padding; targets int32 [b, T], the next token of the same
        document, 0 where there is none; positions int32 [b, T], from 0 in every document, −1 at
        padding; segments int32 [b, T], 1, 2, … for the documents of a row, 0 at padding;
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
    return experimental.LimitIterDataset(packed, batches)


def count_batches(config: DataConfig, tokenizer: Any, process_count: int = 1) -> int:
    """Batches in all the epochs: what a loader gives before it stops.

    Exact: the lengths of the documents go through the same packing. What does not fill a batch at
    the end is left out. Of several processes, the one with the fewest counts for all.

    Raises:
        ValueError: as in `make_loader`.
    """
    if process_count < 1 or config.batch_size % process_count:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected a multiple of the "
            f"{process_count} processes"
        )
    return _count(config, open_documents(config, tokenizer), process_count)


@functools.lru_cache(maxsize=8)
def _count(config: DataConfig, sources: tuple[Documents, ...], process_count: int) -> int:
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
    """In place of the documents, nothing but as many zeros."""

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
    """All documents of a run, in order, on one process."""
    parts, rows = [], 0
    for index, source in enumerate(sources):
        if len(source) < process_count:
            raise ValueError(
                f"{source.path}: got {len(source)} usable rows, expected at least one for each of "
                f"the {process_count} processes"
            )
        part = grain.MapDataset.source(source)[process_index::process_count]
        rows += len(part)
        seed = np.random.SeedSequence([config.seed, index]).generate_state(1)[0]
        parts.append(part.shuffle(seed=int(seed)).repeat())
    weights = [source.weight for source in config.sources]
    return grain.MapDataset.mix(parts, weights)[: max(1, round(config.epochs * rows))]


def _pack(
    config: DataConfig, documents: grain.MapDataset, features: tuple[str, ...]
) -> grain.IterDataset:
    """Rows of T, each with the documents that found room in it."""
    # One thread: a tokenizer's settings must not change under another thread.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return experimental.FirstFitPackIterDataset(
        stream,
        length_struct=dict.fromkeys(features, config.sequence_length),
        num_packing_bins=max(BINS, config.batch_size),
        seed=config.seed % 2**32,
    )


def _shift(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Targets and weights of a packed batch: what the next place of the same document holds."""
    tokens, segments = packed["tokens"], packed["tokens_segment_ids"]
    goes_on = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    targets[:, :-1] = np.where(goes_on, tokens[:, 1:], 0)
    weights[:, :-1] = goes_on & packed["learned"][:, 1:]
    positions = np.where(segments > 0, packed["tokens_positions"], np.int32(-1))
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "weights": weights,
    }
