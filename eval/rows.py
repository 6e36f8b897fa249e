"""Rows, JSON and text of local files, packed or not, and rows of hub datasets."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvjax.data_files import open_hub
from kvjax.paths import local_path
from kvjax.text_files import PACKED, parse_object, read_text

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


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The JSON objects of a file, one a line; blank lines are skipped.

    Args:
        limit: read at most this many rows; later lines are not parsed.

    Raises:
        ValueError: a URL, see `read_text`, a line that is not a JSON object, or no rows.
    """
    found = _parsed(read_text(local_path(path, "the file")), str(path), limit)
    if not found and limit != 0:
        raise ValueError(f"{path} has no rows, expected at least one")
    return found


def _parsed(text: str, name: str, limit: int | None = None) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if limit is not None and len(rows) >= limit:
            break
        if line.strip():
            where = f"{name}, line {number}"
            rows.append(Row(where, parse_object(line.encode(), where)))
    return rows


def hub_rows(dataset: str, config: str, split: str) -> list[Row]:
    """The rows of a hub dataset, loaded with the package `datasets`.

    Raises:
        ValueError: the package is missing, or the dataset cannot be loaded.
    """
    try:
        found = open_hub(dataset, config, split)
    except ValueError as error:
        raise ValueError(f"{error}; or give local files with --data-dir") from error
    return [Row(found.where(i), found[i]) for i in range(len(found))]


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
            text = packed.read(member).decode()
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"cannot read {member} of {dataset}'s {archive} ({str(error).splitlines()[0]}): "
            "give local files with --data-dir"
        ) from error
    return _parsed(text, member)


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
