"""What became of the rows: how many there are, are left out, and are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.data.config import DataConfig
from train.data.documents import open_documents
from train.data.pipeline import count_batches


@dataclass(frozen=True)
class SourceSummary:
    """One source, each row counted once.

    Attributes:
        path: as in its config.
        rows: how many were read.
        too_long: those of more than sequence_length tokens, dropped or cut.
        dropped: those left out, because of that or because nothing in them is learned.
        tokens: of the rows kept.
        learned_tokens: those of them that carry loss.
        epochs: how often the run sees each row kept, on average.
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
    """All sources, and the batches of the run."""

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
