"""Rows of local files and of hub datasets, read by number; text and JSON, packed or not.

Local files are .jsonl, .json, .parquet or .txt; all but .parquet may also be packed (.gz, .xz).
`id_rows` reads an .npy file of token ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from kvjax.extras import import_extra
from kvjax.paths import local_path
from kvjax.text_files import PACKED, named, parse_object, read_bytes, read_json, read_text

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
CHUNK = 1 << 26
"""Number of bytes that are searched for line ends at a time."""


@runtime_checkable
class Rows(Protocol):
    """Random access to rows, each a mapping from column to value."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """One row.

        Raises:
            ValueError: the row is damaged; the message names the file and the line.
        """
        ...

    def where(self, index: int, /) -> str:
        """The row's file and line, or dataset and row, counted from 1, for messages."""
        ...


def open_rows(name: str, split: str = "train") -> Rows:
    """The rows of a local file, or of a hub dataset "org/name" or "org/name:config".

    Lines of a plain .jsonl are parsed when they are read. A packed file is unpacked into memory, a
    .json that is one array is parsed whole, and parquet stays in Arrow's columns.

    Args:
        split: of a hub dataset; a local file is read whole.

    Raises:
        ValueError: no such file, a URL, an unknown kind of file, a file that cannot be unpacked or
            parsed or has no rows, or a hub dataset without the package `datasets`.
    """
    path = local_path(name, "data")
    if path.is_file():
        rows = open_file(path)
    else:
        match = HUB_ID.fullmatch(name)
        if not match or name.endswith((*SUFFIXES, *PACKED)) or path.exists():
            raise ValueError(f"{name}: no such file")
        try:
            rows = open_hub(match[1], match[2], split)
        except ValueError as error:
            raise ValueError(f"{name}: no such file, and as a hub dataset: {error}") from error
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows, expected at least one")
    return rows


def open_file(path: Path) -> Rows:
    """The rows of a local file; there may be none.

    Raises:
        ValueError: see `open_rows`.
    """
    packed = path.suffix if path.suffix in PACKED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    if kind not in SUFFIXES or (kind == ".parquet" and packed):
        raise ValueError(
            f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}, "
            "all but .parquet also with .gz or .xz"
        )
    if kind == ".parquet":
        return Parquet(path)
    if kind == ".txt":
        return Paragraphs(path)
    data = np.frombuffer(read_bytes(path), np.uint8) if packed else _map(path)
    # A .json file holds one array, or one object a line.
    is_array = kind == ".json" and data[:4096].tobytes().lstrip()[:1] == b"["
    return JsonArray(path) if is_array else JsonLines(path, data)


def open_hub(dataset: str, config: str | None, split: str) -> Rows:
    """The rows of a hub dataset, loaded with the package `datasets`.

    Args:
        config: the dataset's configuration; None for its only one.

    Raises:
        ValueError: the package is missing, or the dataset cannot be loaded.
    """
    name = dataset if config is None else f"{dataset}:{config}"
    try:
        datasets = import_extra("datasets", "data")
    except ValueError as error:
        raise ValueError(f"{name} comes from the hub: {error}") from error
    try:
        return HubRows(name, datasets.load_dataset(dataset, config, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}, split {split!r}: {error}") from error


class JsonLines:
    """One JSON object per line; blank lines are skipped.

    Keeps only the positions of the lines (16 bytes per row), and parses a line when it is read.
    """

    def __init__(self, path: Path, data: UInt8[np.ndarray, " bytes"]):
        self.path = path
        self.data = data
        self.ends = np.concatenate([_line_ends(data), [len(data)]])
        # Without blank lines, which would not parse.
        self.lines = np.array([i for i in range(len(self.ends)) if self._line(i).strip()], np.int64)

    def _line(self, line: int) -> bytes:
        start = self.ends[line - 1] + 1 if line else 0
        return self.data[start : self.ends[line]].tobytes()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return parse_object(self._line(int(self.lines[index])), self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index] + 1}"


class JsonArray:
    """One JSON array of objects, parsed whole."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = read_json(path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self.rows[index]
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(index)} holds {named(row)}, expected an object")
        return row

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"


class Paragraphs:
    """A text, split at blank lines, with the column "text"; the whole text is kept in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.text = read_text(path)
        # A paragraph: lines with text, up to a blank line or the end.
        self.spans = [m.span() for m in re.finditer(r"\S.*(?:\n.*\S.*)*", self.text)]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        start, end = self.spans[index]
        return {"text": self.text[start:end].rstrip()}

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.text.count(chr(10), 0, self.spans[index][0]) + 1}"


class Parquet:
    """A parquet file, mapped into memory."""

    def __init__(self, path: Path):
        pyarrow = import_extra("pyarrow", "data")
        parquet = import_extra("pyarrow.parquet", "data")
        self.path = path
        try:
            self.table = parquet.read_table(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a parquet file: {error}") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"


class HubRows:
    """A dataset of the package `datasets`."""

    def __init__(self, name: str, dataset: Any):
        self.name = name
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.dataset[index]

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"


def _map(path: Path) -> UInt8[np.ndarray, " bytes"]:
    """The bytes of a file, mapped into memory."""
    if path.stat().st_size == 0:  # numpy refuses to map an empty file
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _line_ends(data: UInt8[np.ndarray, " bytes"]) -> np.ndarray:
    """Positions of all line ends. In chunks: a comparison makes an array as large as its input."""
    found = [
        np.flatnonzero(data[start : start + CHUNK] == ord("\n")) + start
        for start in range(0, len(data), CHUNK)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def id_rows(path: Path) -> Integer[np.ndarray, "S T"]:
    """The token ids in an .npy file, which are not compared with a vocabulary yet.

    Raises:
        ValueError: no such file, another one, or an array of another shape or dtype.
    """
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        rows = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of token ids: {error}") from None
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"{path} holds {rows.dtype} {rows.shape}, expected integers [S, T]")
    return rows
