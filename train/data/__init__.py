"""Data for supervised fine-tuning: rows of text → packed batches of tokens.

sources (rows of a file, by number) → formats (a row as messages) → templates (messages as text)
→ encoding (text as ids, and which of them are learned) → documents (what fits) → pipeline
(shuffle, mix, pack, batch: grain).
"""

from train.data.config import DataConfig, SourceConfig
from train.data.documents import check_documents
from train.data.pipeline import count_batches, make_loader
from train.data.report import SourceSummary, Summary, summary

__all__ = [
    "DataConfig",
    "SourceConfig",
    "SourceSummary",
    "Summary",
    "check_documents",
    "count_batches",
    "make_loader",
    "summary",
]
