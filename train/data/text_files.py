"""Rows of JSON and text files, given their bytes (in memory, or a mapped file)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

CHUNK = 1 << 26
"""Bytes that are searched for line ends at a time."""


class JsonLines:
    """One JSON object a line; blank lines are no rows.

    Only the places of the lines are kept (16 bytes a row); a line is parsed when it is asked for.
    """

    def __init__(self, path: Path, data: UInt8[np.ndarray, " bytes"]):
        self.path = path
        self.data = data
        self.ends = np.concatenate([_line_ends(data), [len(data)]])
        self.lines = np.array([i for i in range(len(self.ends)) if self._line(i).strip()], np.int64)

    def _line(self, line: int) -> bytes:
        start = self.ends[line - 1] + 1 if line else 0
        return self.data[start : self.ends[line]].tobytes()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The row.

        Raises:
            ValueError: the line is no JSON object.
        """
        try:
            row = json.loads(self._line(self.lines[index]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got a line that is not JSON ({error}), expected an object") from None
        return _mapping(row)

    def where(self, index: int) -> str:
        return f"{self.path} line {self.lines[index] + 1}"


class JsonArray:
    """One JSON array of objects, parsed whole."""

    def __init__(self, path: Path, data: UInt8[np.ndarray, " bytes"]):
        self.path = path
        try:
            self.rows = json.loads(data.tobytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _mapping(self.rows[index])

    def where(self, index: int) -> str:
        return f"{self.path} row {index + 1}"


class Paragraphs:
    """A text, split at blank lines; the text is kept in memory."""

    def __init__(self, path: Path, data: UInt8[np.ndarray, " bytes"]):
        self.path = path
        try:
            self.text = data.tobytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error
        self.spans = [m.span() for m in re.finditer(r"\S.*(?:\n.*\S.*)*", self.text)]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        start, end = self.spans[index]
        return {"text": self.text[start:end].rstrip()}

    def where(self, index: int) -> str:
        return f"{self.path} line {self.text.count(chr(10), 0, self.spans[index][0]) + 1}"


def _line_ends(data: UInt8[np.ndarray, " bytes"]) -> np.ndarray:
    found = [
        np.flatnonzero(data[start : start + CHUNK] == ord("\n")) + start
        for start in range(0, len(data), CHUNK)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise ValueError(f"got a JSON {type(row).__name__}, expected an object")
    return row
