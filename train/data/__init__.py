"""Data for supervised fine-tuning: rows of files → packed batches of tokens.

The path of a row: `kvjax.data_files` reads the row by number; formats turns the row into messages
and the messages into pieces of text; documents encodes the pieces, marks what is learned and drops
what does not fit; pipeline shuffles, mixes, packs and batches the documents with grain.
"""

from train.data.config import DataConfig, SourceConfig
from train.data.documents import check_documents
from train.data.pipeline import (
    SourceSummary,
    Summary,
    count_batches,
    epochs_for,
    make_loader,
    summary,
)

__all__ = [
    "DataConfig",
    "SourceConfig",
    "SourceSummary",
    "Summary",
    "check_documents",
    "count_batches",
    "epochs_for",
    "make_loader",
    "summary",
]
