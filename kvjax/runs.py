"""Files of a run that can be stopped at any time and resumed by the same command.

Four rules hold for every resumable job:

1. The settings are written first. A job with other settings is refused (`claim`, `check_same`).
2. A result is written atomically (`write_whole`, `write_json`, `write_picture`).
3. A file of JSON lines grows by whole lines. A kill can only tear the last line, which is cut off
   before more lines are added (`append_lines`, `cut_torn_line`, `whole_lines`).
4. One process at a time writes to an output (`kvjax.endings.only_writer`).
"""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from kvjax.extras import pyplot
from kvjax.paths import replacing, sync
from kvjax.text_files import read_object

PACK = {".gz": functools.partial(gzip.compress, mtime=0), ".xz": lzma.compress}
"""How to pack a file, by the end of its name; `kvjax.text_files.read_bytes` unpacks it."""


def claim(
    path: Path,
    settings: Mapping[str, Any],
    holder: str,
    advice: str,
    ignored: Collection[str] = (),
) -> None:
    """Writes the settings of a run to a JSON file, or compares them with the file that is there.

    Call it when all input is read and checked: a mistyped path must not become a run's setting.

    Args:
        path: e.g. config.json in the run's folder, which is made if it is missing.
        settings: everything that the result depends on; JSON values.
        holder, advice: for the error, see `check_same`.
        ignored: names of settings that may change when the run is resumed.

    Raises:
        ValueError: the file is not a JSON object, or the settings differ.
    """
    check_claim(path, settings, holder, advice, ignored)
    write_json(path, settings)


def check_claim(
    path: Path,
    settings: Mapping[str, Any],
    holder: str,
    advice: str,
    ignored: Collection[str] = (),
) -> None:
    """Compares the settings of a run with the file of `claim`, if there is one; writes nothing.

    Raises:
        ValueError: see `claim`.
    """
    # As JSON returns them: tuples become lists, so that both sides compare equal.
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        check_same(read_settings(path), wanted, holder, advice, ignored)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `claim` wrote.

    Raises:
        ValueError: the file is not a JSON object.
    """
    return read_object(path)


def check_same(
    held: Any,
    wanted: Mapping[str, Any],
    holder: str,
    advice: str,
    ignored: Collection[str] = (),
) -> None:
    """Refuses to resume a job whose settings have changed.

    Args:
        held: the settings that were stored; anything but a mapping differs in all names.
        wanted: the settings of this job; JSON values.
        holder: begins the error, e.g. "runs/a holds another run".
        advice: ends the error, e.g. "give another folder".
        ignored: names of settings that may differ.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    different = differences(held, wanted, ignored)
    if different:
        raise ValueError(f"{holder} ({different}): {advice}")


def differences(held: Any, wanted: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """The settings that differ, as "seed 0, now 1, dtype float32, now bfloat16"; "" for none."""
    stored = held if isinstance(held, Mapping) else {}
    names = [name for name in {**stored, **wanted} if name not in ignored]
    return ", ".join(
        f"{name} {_short(stored.get(name))}, now {_short(wanted.get(name))}"
        for name in names
        if stored.get(name) != wanted.get(name)
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically, packed where the name ends with .gz or .xz; makes its folder.

    See `kvjax.paths.replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(PACK.get(path.suffix, bytes)(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; makes its folder."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_picture(path: Path, figure: Any, dpi: int) -> None:
    """Writes a figure of matplotlib as a PNG, atomically, and closes it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
    pyplot().close(figure)


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Adds JSON lines with one write, and waits until the disk has them."""
    # JSON keeps every bit of a float: Python writes the shortest text that reads back the same.
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(value) + "\n" for value in values))
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """The lines that end with a line break; [] without a file. The file stays as it is."""
    if not path.exists():
        return []
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1].splitlines()


def cut_torn_line(path: Path) -> None:
    """Cuts off a last line that has no line break: a kill came while it was written."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
