"""Rows, JSON and text of local files, packed or not, and rows of hub datasets."""

from __future__ import annotations

import gzip
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvjax.paths import local_path

PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}
KINDS = (".jsonl", ".json", ".txt")


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Attributes:
        where: file and line, or dataset and row, counted from 1, for errors.
        values: column → value.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, *columns: str) -> str:
        """The text in the first of these columns that the row has.

        Raises:
            ValueError: the row has none of the columns, or the value is not text.
        """
        value = self.value(*columns)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {columns[0]!r} is {value!r:.60}, expected text")
        return value

    def texts(self, *columns: str) -> list[str]:
        """As `text`, for a list of at least one text. Whole numbers in it become texts.

        Raises:
            ValueError: the row has none of the columns, or the value is not such a list.
        """
        value = self.value(*columns)
        # type() instead of isinstance(): True is an int, but not an answer.
        right = isinstance(value, list) and all(type(part) in (str, int) for part in value)
        if not right or not value:
            raise ValueError(
                f"{self.where}: {columns[0]!r} is {value!r:.60}, expected a list of texts"
            )
        return [str(part) for part in value]

    def value(self, *columns: str) -> Any:
        """The value in the first of these columns that the row has.

        Raises:
            ValueError: the row has none of the columns.
        """
        for column in columns:
            if column in self.values:
                return self.values[column]
        raise ValueError(f"{self.where}: no {columns[0]!r}, got {', '.join(self.values)}")


def look(folder: Path, name: str, kinds: Sequence[str] = KINDS) -> Path | None:
    """The path of `name` with one of the endings, plain or packed (.gz, .xz); None: no file."""
    # Plain files win over packed ones of the same name.
    candidates = [folder / f"{name}{kind}{end}" for kind in kinds for end in ("", *PACKED)]
    return next((path for path in candidates if path.is_file()), None)


def find(folder: Path, name: str, kinds: Sequence[str] = KINDS, of: str = "") -> Path:
    """As `look`, for a file that must exist.

    Args:
        of: for the error: the expected content, and where to get it.

    Raises:
        ValueError: no such file.
    """
    path = look(folder, name, kinds)
    if path is None:
        raise ValueError(
            f"no {folder / name}{kinds[0]} (nor .gz, .xz)" + (f": expected {of}" if of else "")
        )
    return path


def read_text(path: Path) -> str:
    """The whole text of a file in UTF-8, unpacked.

    Raises:
        ValueError: no such file, a URL, a damaged archive, or text that is not UTF-8.
    """
    if not local_path(path, "the file").is_file():
        raise ValueError(f"no file at {path}")
    data = path.read_bytes()
    try:
        return PACKED.get(path.suffix, bytes)(data).decode()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_json(path: Path) -> Any:
    """The JSON value of a file.

    Raises:
        ValueError: as `read_text`, or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The JSON objects of a file, one in each line. Blank lines are skipped.

    Args:
        limit: number of rows; later lines are not parsed.

    Raises:
        ValueError: as `read_text`, a line that is not a JSON object, or a file without rows.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if limit is not None and len(rows) >= limit:
            break
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}"))
    if not rows and limit != 0:
        raise ValueError(f"{path} has no rows, expected at least one")
    return rows


def hub_rows(dataset: str, config: str, split: str) -> list[Row]:
    """The rows of a hub dataset, through the package `datasets`.

    Raises:
        ValueError: the package is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{dataset} comes from the hub, which needs a package: pip install datasets; "
            "or give local files with --data-dir"
        ) from None
    try:
        found: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{dataset}, {config}, split {split!r}: {error}") from error
    return [Row(f"{dataset} {config} row {i}", row) for i, row in enumerate(found, 1)]


def hub_archive(dataset: str, archive: str, member: str) -> list[Row]:
    """The rows of a .jsonl inside a .zip of a hub dataset that `datasets` cannot load.

    Raises:
        ValueError: the archive cannot be loaded or lacks the member, or a line is damaged.
    """
    import huggingface_hub

    try:
        # `datasets` refuses data sets with a loading script, so the archive is read directly.
        path = huggingface_hub.hf_hub_download(dataset, archive, repo_type="dataset")
        with zipfile.ZipFile(path) as packed:
            lines = packed.read(member).decode().split("\n")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{member} of {dataset}'s {archive} cannot be had ({str(error).splitlines()[0]}): "
            "give local files with --data-dir"
        ) from error
    return list(_parsed(lines, member))


def _parsed(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(line, f"{name}, line {number}")


def _row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a JSON {type(values).__name__}, expected an object")
    return Row(where, values)


def named_rows(folder: Path | None, name: str, hub: tuple[str, str], split: str) -> list[Row]:
    """All rows of a data set that has one file for each split.

    Args:
        folder: contains `name`.jsonl, plain or packed, or the file alone without the folders in
            `name`; None: the rows come from the hub.
        name: a path such as "gsm8k/test".
        hub: dataset and configuration on the hub.
        split: of the hub's dataset.

    Raises:
        ValueError: see `read_rows` and `hub_rows`.
    """
    if folder is None:
        return hub_rows(*hub, split)
    kinds = (".jsonl",)
    path = look(folder, name, kinds)
    return read_rows(path or find(folder, Path(name).name, kinds, of=f"{name} or that"))
