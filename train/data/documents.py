"""The rows of a source that fit into a sequence, as documents."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from train.data.config import DataConfig, SourceConfig
from train.data.encoding import Document, Encoder
from train.data.sources import Rows, open_rows

log = logging.getLogger(__name__)


class Documents:
    """Random access to the documents of one source.

    All rows are encoded once, to find the bad and the long ones before training starts; what is
    kept of it is the lengths. A document is encoded again when it is asked for.

    Attributes:
        path: of the source.
        rows: how many there are, after max_rows.
        too_long: rows of more than T tokens; dropped, or cut to T.
        dropped: rows that are left out: too long, or nothing to learn in their first T tokens.
        kept: int64 [n], the rows that are documents.
        lengths: int32 [n], tokens of each.
        learned: int32 [n], tokens of each that are learned.
        largest_id: of all their tokens.
    """

    def __init__(self, path: str, rows: Rows, encode: Encoder, config: DataConfig):
        """
        Raises:
            ValueError: a bad row, by file and line; or no row is left.
        """
        self.path = path
        self.rows = min(len(rows), config.max_rows or len(rows))
        self._rows, self._encode, self._T = rows, encode, config.sequence_length
        full = np.zeros(self.rows, np.int64)
        learned, largest = np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int64)
        for row in range(self.rows):
            document = self._document(row)
            full[row] = len(document.tokens)
            largest[row] = document.tokens[: self._T].max(initial=0)
            learned[row] = document.learned[1 : self._T].sum()  # the first has nothing before it
        too_long = full > self._T
        drop = learned == 0
        if config.long_rows == "drop":
            drop |= too_long
        if drop.all():
            raise ValueError(
                f"{path}: got {self.rows} rows of {full.min()} to {full.max()} tokens, expected "
                f"some with an answer within sequence_length={self._T}: raise it, or set "
                "long_rows='truncate'"
            )
        self.too_long, self.dropped = int(too_long.sum()), int(drop.sum())
        self.kept = np.flatnonzero(~drop)
        self.lengths = np.minimum(full, self._T).astype(np.int32)[self.kept]
        self.learned = learned[self.kept]
        self.largest_id = int(largest[self.kept].max())
        if self.too_long or self.dropped:
            log.warning(
                "%s: %d of %d rows have more than %d tokens; %d rows are left out",
                *(path, self.too_long, self.rows, self._T, self.dropped),
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Document `index` of those kept: tokens int32 [n] and learned bool [n], n ≤ T."""
        tokens, learned = self._document(int(self.kept[index]))
        return {"tokens": tokens[: self._T], "learned": learned[: self._T]}

    def _document(self, row: int) -> Document:
        try:
            return self._encode(self._rows[row])
        except ValueError as error:
            raise ValueError(f"{self._rows.where(row)}: {error}") from error


def open_documents(config: DataConfig, tokenizer: Any) -> tuple[Documents, ...]:
    """The documents of every source; sources that were opened before are not read again.

    Raises:
        ValueError: as in `open_rows`, `Encoder` and `Documents`.
    """
    # What is made of the documents makes no others.
    config = dataclasses.replace(config, batch_size=1, epochs=1, seed=0)
    return tuple(
        _open(
            dataclasses.replace(config, sources=(dataclasses.replace(source, weight=1.0),)),
            tokenizer,
            str(tokenizer.chat_template),
            _stamp(source),
        )
        for source in config.sources
    )


def check_documents(
    config: DataConfig, tokenizer: Any, vocab_size: int, context_length: int
) -> None:
    """Raises ValueError for documents that a model cannot read; names each source that has some.

    A device gives the last token's embedding for an id that a model does not have, and no error.
    """
    problems = []
    for source in open_documents(config, tokenizer):
        if source.largest_id >= vocab_size:
            problems.append(
                f"{source.path}: the tokenizer gives token {source.largest_id}, expected at most "
                f"{vocab_size - 1}: it is not the model's"
            )
        if source.lengths.max() > context_length:
            problems.append(
                f"{source.path}: got a document of {source.lengths.max()} tokens, expected at most "
                f"{context_length}, the model's context: lower sequence_length"
            )
    if problems:
        raise ValueError("; ".join(problems))


def _stamp(source: SourceConfig) -> tuple[int, int] | None:
    """What changes when a file does."""
    path = Path(source.path)
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _open(config: DataConfig, tokenizer: Any, chat_template: str, stamp: Any) -> Documents:
    del chat_template, stamp  # they only say whether an earlier result still holds
    (source,) = config.sources
    encode = Encoder(tokenizer, source.format, config.template, config.learn)
    return Documents(source.path, open_rows(source), encode, config)
