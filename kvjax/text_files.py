"""Files of text, JSON and YAML, packed or not: read whole and strictly, or refused by name.

JSON that Python's own reader takes is refused here where another reader, or a later write, would
fail: names that come twice in an object, lone surrogates, and nesting that is deeper than 200.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvjax.extras import import_extra
from kvjax.fields import Problems, shown

PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}
POINTER = b"version https://git-lfs.github.com/spec/v1"
DEEPEST = 200
"""Number of levels of lists and objects, in YAML as in JSON."""
MOST_NODES = 100_000
"""Largest size of a YAML file whose aliases are written out."""


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked where its name ends with .gz or .xz.

    Raises:
        ValueError: no such file, a git-lfs pointer, or a file that cannot be unpacked.
    """
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    data = path.read_bytes()
    if data.startswith(POINTER):
        raise ValueError(pointer_message(path))
    try:
        return PACKED.get(path.suffix, bytes)(data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {error}") from None


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, packed or not.

    Raises:
        ValueError: see `read_bytes`, or the file is not UTF-8.
    """
    return _decoded(read_bytes(path), str(path))


def read_json(path: Path) -> Any:
    """The JSON value of a file, packed or not.

    Raises:
        ValueError: see `read_text` and `parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, packed or not.

    Raises:
        ValueError: see `read_json`, or the file holds another value.
    """
    return parse_object(read_bytes(path), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
        ValueError: see `parse_json`, or the text is of another value.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {named(value)}, expected an object")
    return value


def parse_json(data: bytes, where: str) -> Any:
    """The value of a JSON text.

    Args:
        where: file and line, for the error.

    Raises:
        ValueError: the text is not UTF-8, not JSON, or JSON that is refused, see above.
    """
    from pydantic_core import from_json

    text = _decoded(data, where)
    try:
        from_json(data)
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def named(value: Any) -> str:
    """A JSON value that is no object, for an error: "a list", or a short one itself."""
    return "a list" if isinstance(value, list) else shown(value)


def read_yaml(path: Path, extra: str) -> dict[str, Any]:
    """The names and values of a YAML file; none for an empty file.

    A number may be written as in JSON: 1e-3, which YAML itself takes for a text.

    Args:
        extra: the extra of pyproject.toml that installs the package yaml.

    Raises:
        ValueError: no such file, not YAML, aliases that stand for too much, or not a mapping from
            texts.
    """
    yaml = import_extra("yaml", extra)
    text = read_text(path)
    try:
        _check_depth(yaml, text, path)
        loader = _yaml_loader(yaml)(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            raise Problems([f"{path} has aliases that stand for more than {MOST_NODES} values"])
        value = {} if node is None else loader.construct_document(node)
    except Problems:
        raise
    except Exception as error:  # a value with a tag such as !!float '' may raise anything
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {named(value)}, expected names and values")
    return value


def _yaml_loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):
        """YAML's plain values, numbers as in JSON, and names that come once."""

        def construct_mapping(self, node, deep=False):
            own = [key for key, _ in node.value if not key.tag.endswith(":merge")]
            names = [self.construct_object(key, deep=True) for key in own]
            odd = [name for name in names if not isinstance(name, str)]
            if odd:
                raise ValueError(f"got the name {shown(odd[0])}, expected a text")
            _without_duplicates([(name, None) for name in names])
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _check_depth(yaml: Any, text: str, path: Path) -> None:
    # The reader is recursive, and takes seconds to fail where lists are 100,000 deep.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise Problems([f"{path} is not YAML: more than {DEEPEST} levels"])


def _size(node: Any, known: dict[int, int]) -> int:
    """The number of values below a node of YAML, its aliases written out; not itself."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # of a node that is inside of itself
    parts = [node.value] if isinstance(node.value, str) else node.value
    parts = [each for part in parts for each in (part if isinstance(part, tuple) else [part])]
    size = 1 + sum(_size(part, known) for part in parts if not isinstance(part, str))
    known[id(node)] = size
    return size


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{shown(twice[0])} comes twice in an object")
    return found


def is_pointer(path: Path) -> bool:
    """Whether a file is the text that git-lfs keeps in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def pointer_message(path: Path | str) -> str:
    """The error for a git-lfs pointer at `path`, with the command that fetches the file."""
    return f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Checks files that another library will read.

    Raises:
        ValueError: names every git-lfs pointer.
    """
    found = [pointer_message(path) for path in sorted(paths) if path.is_file() and is_pointer(path)]
    if found:
        raise Problems(found)
