"""JSON objects in files, and what lies in their place when a clone is not complete."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs.github.com/spec/v1"


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and the JSON object in it.

    Raises:
        ValueError: no such file, a git-lfs pointer, no UTF-8, no JSON, or JSON that is no object.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    data = path.read_bytes()
    if data.startswith(POINTER):
        raise ValueError(pointer_message(path))
    try:
        text = data.decode("utf-8")
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected an object")
    return text, raw


def is_pointer(path: Path) -> bool:
    """Whether a file is the text that git-lfs keeps in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def pointer_message(path: Path | str) -> str:
    """Says that `path` is a pointer, and what to do about it."""
    return f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Checks files that another library will read.

    Raises:
        ValueError: names every git-lfs pointer.
    """
    found = [pointer_message(path) for path in sorted(paths) if path.is_file() and is_pointer(path)]
    if found:
        raise ValueError("; ".join(found))
