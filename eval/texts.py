"""Texts as one sequence of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from eval.rows import hub_rows, read_rows, read_text
from kvjax.text import prompt_ids

HUB = "hub:"


def read_ids(names: Sequence[str], tokenizer: Any) -> Int[np.ndarray, " S"]:
    """Ids of all documents of all texts, joined with blank lines.

    Args:
        names: .txt files, one document each; .jsonl files with a document in each line's "text";
            either may be packed (.gz, .xz); or "hub:DATASET:CONFIG:SPLIT" with the same column.

    Raises:
        ValueError: nothing there, a line that is no document (says which), or no text at all.
    """
    text = "\n\n".join(document for name in names for document in documents(name))
    if not text.strip():
        raise ValueError(f"no text in {', '.join(names) or 'no files'}")
    return np.asarray(prompt_ids(tokenizer, text), np.int32)


def documents(name: str) -> Iterator[str]:
    """The documents of one text; see `read_ids`."""
    if name.startswith(HUB):
        parts = name.removeprefix(HUB).split(":")
        if len(parts) != 3:
            raise ValueError(f"got text {name!r}, expected hub:DATASET:CONFIG:SPLIT")
        yield from (row.text("text") for row in hub_rows(*parts))
    elif ".jsonl" in Path(name).suffixes:
        yield from (row.text("text") for row in read_rows(Path(name)))
    else:
        yield read_text(Path(name))
