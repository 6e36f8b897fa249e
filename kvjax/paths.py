"""Paths of commands: no URLs, and files that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

# At least two letters: "C:/models" is a drive. One slash: Path("gs://b") has become "gs:/b".
URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(//?)(.*)", re.DOTALL)
ADVICE = {
    "gs": "copy it with `gcloud storage cp --recursive`, or mount the bucket as a folder",
    "s3": "copy it with `aws s3 cp --recursive`, or mount the bucket as a folder",
    "hf": "for a model of the hub give its id alone, such as org/name",
    "http": "download it first; for a model of the hub give its id alone, such as org/name",
    "https": "download it first; for a model of the hub give its id alone, such as org/name",
    "file": "give the path alone",
}
"""What to do instead, by scheme. These are refused even where a folder has such a name."""


def local_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """The path, unless it is a URL such as gs://bucket/model.

    Args:
        what: names the path in the error.

    Raises:
        ValueError: the path is a URL, even one that pathlib has shortened to "gs:/bucket/model", or
            no path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{what} is {type(path).__name__}, expected a path")
    text = str(path)
    match = URL.match(text)
    if match is None:
        return Path(path)
    scheme, slashes, rest = match[1].lower(), match[2], match[3]
    if scheme not in ADVICE and slashes == "/" and Path(f"{match[1]}:").is_dir():
        return Path(path)  # a folder whose name ends with a colon
    advice = ADVICE.get(scheme, "copy it to a local folder, or mount it as one")
    raise ValueError(f"{what} is the URL {match[1]}://{rest}, expected a local path: {advice}")


def check_local(value: Any, name: str = "path") -> None:
    """Refuses URLs among the paths of a command's arguments, before the command does any work.

    Args:
        value: arguments by name, a dataclass of them, or one of them. Every `Path` in them is
            checked; a text is not, since it may be a prompt or a hub id.

    Raises:
        ValueError: see `local_path`.
    """
    if isinstance(value, Path):
        local_path(value, name.replace("_", " "))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_local(item, str(key))
    elif isinstance(value, tuple | list):
        for item in value:
            check_local(item, name)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_local(getattr(value, field.name), field.name)


def is_inside(name: Any) -> bool:
    """Whether a name that a file gives is a path below the folder that it is meant for."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def local_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with `check_local` of its arguments before it begins."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def checked(*args: Any, **settings: Any) -> Any:
        check_local(signature.bind(*args, **settings).arguments)
        return command(*args, **settings)

    return checked


def take_flag(argv: list[str], flag: str, expected: str) -> tuple[str | None, list[str]]:
    """The last value of a flag, "--flag VALUE" or "--flag=VALUE", and the arguments without it.

    Args:
        expected: describes a valid value in the error.

    Raises:
        ValueError: the flag has no value.
    """
    found, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != flag:
            rest.append(word)
            continue
        found = value if equals else next(words, None)
        if found is None:
            raise ValueError(f"got {flag} without a value, expected {expected}")
    return found, rest


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of the one at `path`, which keeps its content until the block ends.

    The new content is written beside it in a part of its own, synced to disk and renamed in one
    step, so of two writers at a time the last one wins. After an error such as a full disk the part
    is gone, and the old file is what it was. A killed process leaves its part, which the next
    writer removes. What is not a regular file, such as /dev/stdout, is written directly.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    clear_parts(path)
    part, file = _new_part(path)
    with file:  # closed at the very end: until then the lock says that the part is in use
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync(path.parent)


def is_part(name: str, of: str) -> bool:
    """Whether a file's name is that of a part of the file `of`, see `replacing`."""
    return re.fullmatch(rf"{re.escape(of)}\.[0-9a-f]{{8}}\.part", name) is not None


def clear_parts(path: Path) -> None:
    """Removes what killed processes left of `replacing(path)`: parts that nobody has locked."""
    for part in path.parent.iterdir():
        # A part may vanish at any time, since its writer renames it.
        if is_part(part.name, path.name):
            with contextlib.suppress(OSError), part.open("r+b") as file:
                _lock(file)
                part.unlink()


def _new_part(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        file = part.open("xb")
        with contextlib.suppress(OSError):  # some file systems have no locks
            _lock(file)
        # Before it was locked, another process may have taken it for a leftover.
        if part.exists():
            return part, file
        file.close()


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError as error:  # Windows, where an open file cannot be removed anyway
        raise OSError("this system has no locks of this kind") from error
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync(*paths: Path) -> None:
    """Waits until the disk has these files, and the names of what is in these folders."""
    for path in paths:
        # Some file systems cannot sync folders, or open them.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def copy_whole(source: Path, out: Path) -> None:
    """Copies a file as a whole or not at all, see `replacing`."""
    with source.open("rb") as old, replacing(out) as new:
        shutil.copyfileobj(old, new)
