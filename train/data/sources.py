"""Rows of a file or a hub dataset, read by number."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvjax.paths import local_path
from train.data.config import SourceConfig
from train.data.text_files import JsonArray, JsonLines, Paragraphs

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


class Rows(Protocol):
    """Random access to rows, each a mapping from column to value."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    def where(self, index: int, /) -> str:
        """The file and the line or row of it, counted from 1, for messages."""
        ...


def open_rows(source: SourceConfig) -> Rows:
    """The rows of a source.

    Lines of a plain .jsonl are parsed when asked for; a packed file is unpacked into memory, a
    .json that is one array is parsed whole, parquet stays in Arrow's columns.

    Raises:
        ValueError: no such file, a URL, an unknown kind of file, one that cannot be unpacked or
            parsed, one without rows, or a hub dataset without the package that loads it.
    """
    path = local_path(source.path, "data")
    rows = _open_file(path) if path.is_file() else _open_hub(source)
    if len(rows) == 0:
        raise ValueError(f"{source.path}: no rows, expected at least one")
    return rows


def _open_file(path: Path) -> Rows:
    packed = path.suffix if path.suffix in PACKED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    if kind not in SUFFIXES or (kind == ".parquet" and packed):
        raise ValueError(
            f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}, "
            "all but .parquet also with .gz or .xz"
        )
    if kind == ".parquet":
        return Parquet(path)
    data = _unpack(path, packed) if packed else _map(path)
    if kind == ".txt":
        return Paragraphs(path, data)
    is_array = kind == ".json" and data[:4096].tobytes().lstrip()[:1] == b"["
    return JsonArray(path, data) if is_array else JsonLines(path, data)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, mapped into memory."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _unpack(path: Path, packed: str) -> np.ndarray:
    try:
        return np.frombuffer(PACKED[packed](path.read_bytes()), np.uint8)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a whole {packed} file ({error})") from error


class Parquet:
    """A parquet file."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self.table = pyarrow.parquet.read_table(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.table.slice(index, 1).to_pylist()[0]

    def where(self, index: int) -> str:
        return f"{self.path} row {index + 1}"


class HubRows:
    """A dataset of the `datasets` package."""

    def __init__(self, name: str, dataset: Any):
        self.name = name
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.dataset[index]

    def where(self, index: int) -> str:
        return f"{self.name} row {index + 1}"


def _open_hub(source: SourceConfig) -> HubRows:
    """A hub dataset; a path that names none is a file that is not there."""
    match = HUB_ID.fullmatch(source.path)
    if not match or source.path.endswith((*SUFFIXES, *PACKED)) or Path(source.path).exists():
        raise ValueError(f"{source.path}: no such file")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"{source.path}: no such file, and loading it from the hub needs a package: "
            "pip install datasets"
        ) from error
    try:
        found = datasets.load_dataset(match[1], match[2], split=source.split)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.path}, split {source.split!r}: {error}") from error
    return HubRows(source.path, found)
