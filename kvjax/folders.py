"""Folders of results: whole or absent, with a record of the command that made them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvjax import processes
from kvjax.endings import lock_of, only_writer
from kvjax.fields import Object, object_problems, refuse
from kvjax.paths import is_inside, sync
from kvjax.runs import check_same, write_json
from kvjax.text_files import read_object

PART = ".kvjax-part"
"""The name, or its end, of a folder that is not complete."""
MOVED = "moved.json"
"""Names that are in the folder only because an incomplete save moved them there."""
LAST = ("config.json", "kvjax.json")
"""Files without which no reader takes a folder for a model; they come last."""
MADE = "kvjax_made.json"
"""The request and the report of the command that made a folder."""


@contextlib.contextmanager
def whole_folder(out: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to fill. When the block ends, its content is at `out`; after an error nothing is.

    A new `out` is the filled folder, renamed. Into a folder that exists, the files move one after
    the other, those of `LAST` at the end. What a killed process left is removed. All of several
    processes may fill the folder; process 0 removes, renames and moves.

    Args:
        check: called before the block and after the removal of leftovers; may refuse `out`.

    Raises:
        ValueError: another process is writing this folder; or the error of `check`.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    inside, beside = _parts(out)
    part = inside if out.is_dir() else beside
    with only_writer(part):
        processes.on_writer(lambda: _clear(out, inside, beside))
        processes.on_writer(check)
        try:
            if processes.is_writer():
                part.mkdir(parents=True, exist_ok=True)
            yield part
            processes.barrier(f"{part} is filled")
            processes.on_writer(lambda: _publish(part, out))
        except BaseException:
            if processes.is_writer():
                _clear(out, part)
            raise


def _parts(out: Path) -> tuple[Path, Path]:
    """Where a folder is filled: inside of it if it exists, else beside it."""
    return out / PART, out.with_name(f"{out.name}{PART}")


def _clear(out: Path, *parts: Path) -> None:
    """Removes incomplete folders, and what moved from them into a folder that is no model yet."""
    for part in parts:
        complete = any((out / name).exists() for name in LAST)
        if (part / MOVED).is_file() and not complete:
            for name in read_object(part / MOVED):
                if is_inside(name) and Path(name).name == name:
                    _remove(out / name)
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _publish(part: Path, out: Path) -> None:
    sync_all(part)
    if part.parent != out:
        os.rename(part, out)
        sync(out.parent)
        return
    paths = sorted(part.iterdir(), key=lambda path: (path.name in LAST, path.name))
    write_json(part / MOVED, {p.name: True for p in paths if not (out / p.name).exists()})
    for path in paths:
        if path.name in LAST:
            sync(out)  # the disk has all other names before this one
        os.replace(path, out / path.name)
    sync(out)
    shutil.rmtree(part)


def sync_all(folder: Path) -> None:
    """Waits until the disk has a folder with all that is in it."""
    for place, _, files in os.walk(folder):
        sync(*(Path(place) / file for file in files), Path(place))


def record_made(folder: Path, request: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Writes which command fills a folder, and its report; call this before the last file.

    Args:
        request: everything that the content depends on, as JSON values.
    """
    write_json(folder / MADE, {"request": request, "report": report})


def made(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of the finished command that made a folder; None where none is recorded.

    Removes what that command left beside its result if it was killed after its last file.

    Raises:
        ValueError: the command had other settings; names them. Or another process writes to `out`.
    """
    path = out / MADE
    if not path.is_file() or not any((out / name).is_file() for name in LAST):
        return None
    held = read_object(path)
    refuse(object_problems(held, {"request": Object, "report": Object}), str(path))
    wanted = json.loads(json.dumps(request))
    check_same(held["request"], wanted, f"{out} holds the result of other settings", OTHER)
    processes.on_writer(lambda: _forget_killed(out))
    return held["report"]


def _forget_killed(out: Path) -> None:
    """Removes the leftovers of a command that was killed when its folder was whole already."""
    for part in _parts(Path(os.path.abspath(out))):
        if part.exists() or lock_of(part).exists():
            with only_writer(part):
                _remove(part)


OTHER = "give another folder"
