"""The header of a GGUF file: its metadata, and where each tensor is.

The gguf package has a reader, but it makes an array of every word of the vocabulary: 2 CPU seconds
for a vocabulary of 49 thousand tokens, 6.5 for 152 thousand. This one takes a tenth of a second,
and does not touch the tensors. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.fields import shown
from kvjax.hf.gguf.files import pieces
from kvjax.text_files import is_pointer, pointer_message

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
"""Kind of a metadata value → its format in `struct`."""
FLOAT32, TEXT, ARRAY = 6, 8, 9
COUNT = struct.Struct("<Q")
ALIGNMENT = 32
MOST_AXES = 8


@dataclass(frozen=True)
class Texts:
    """An array of texts, such as the vocabulary, decoded when it is asked for."""

    raw: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        at = 0
        for _ in range(self.count):
            end = at + 8 + COUNT.unpack_from(self.raw, at)[0]
            # As llama.cpp, which keeps bytes: a vocabulary may hold half of a character.
            yield self.raw[at + 8 : end].decode("utf-8", "replace")
            at = end


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        path: the file.
        kind: number of its quantization, see `gguf.GGMLQuantizationType`.
        shape: of its numbers, rows first.
        start, nbytes: its bytes in the file.
    """

    path: Path
    kind: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a model, of one file or of all its pieces.

    Attributes:
        path: the file, or the first piece.
        metadata: of the first piece, by key.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]


def read_header(path: Path) -> Header:
    """The header of a GGUF file, or of all pieces of a model whose first piece it is.

    Raises:
        ValueError: a file is missing, no GGUF, truncated or damaged, or of another model.
    """
    files = pieces(path)
    stats = [file.stat() for file in files]
    stamps = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    return _joined(tuple(files), stamps)


@functools.lru_cache(maxsize=2)
def _joined(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> Header:
    """The header of all pieces. A load reads it several times, so it is kept while files stay."""
    headers = [_read(file) for file in files]
    tensors: dict[str, Place] = {}
    for number, header in enumerate(headers):
        count, own = (header.metadata.get(f"split.{key}") for key in ("count", "no"))
        if (count or 1, own or 0) != (len(files), number):
            raise ValueError(
                f"{header.path} is piece {(own or 0) + 1} of {count or 1} by its header, expected "
                f"{number + 1} of {len(files)} by its name"
            )
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise ValueError(f"{header.path} has {min(twice)}, which an earlier piece has too")
        tensors |= header.tensors
    return Header(files[0], headers[0].metadata, tensors)


def _read(path: Path) -> Header:
    """The header of one file."""
    size = path.stat().st_size
    if size and is_pointer(path):
        raise ValueError(pointer_message(path))
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, tensors = _parse(_Cursor(data), path)
            except (struct.error, EOFError):
                raise ValueError(
                    f"{path} is truncated: its {size} bytes end within the header"
                ) from None
            except (UnicodeDecodeError, _Damaged) as error:
                raise ValueError(f"{path} is damaged: {error}") from None
    end = max((place.start + place.nbytes for place in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: got {size} bytes, expected {end}")
    return Header(path, metadata, tensors)


class _Damaged(Exception):
    """A header that breaks the format."""


class _Cursor:
    """Reads values one after the other.

    Raises struct.error or EOFError at the end of the bytes.
    """

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}") * count
        self._check(size)
        values = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        (size,) = self.numbers("Q")
        self._check(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def texts(self, count: int) -> Texts:
        start = self.at
        for _ in range(count):  # lengths vary, so nothing but a walk finds the end
            self.at += 8 + COUNT.unpack_from(self.data, self.at)[0]
        self._check(0)
        return Texts(self.data[start : self.at], count)

    def _check(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise EOFError


def _parse(cursor: _Cursor, path: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0
        got = "a file for big-endian machines" if swapped else f"version {version}"
        raise _Damaged(f"got {got}, expected version {' or '.join(map(str, VERSIONS))}")
    tensor_count, value_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = _value(cursor, cursor.numbers("I")[0], key)
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Damaged(f"general.alignment is {alignment!r}, expected a power of two")
    begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: Place(path, kind, shape, begin + offset, _bytes(name, kind, shape))
        for name, kind, shape, offset in entries
    }
    if len(tensors) < tensor_count:
        raise _Damaged("two tensors have one name")
    return metadata, tensors


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == FLOAT32:
        # The shortest number that rounds to this float32: the converter wrote 1e-05, no 9.99…e-06.
        return float(str(np.float32(cursor.numbers("f")[0])))
    if kind in SCALARS:
        return cursor.numbers(SCALARS[kind])[0]
    if kind == TEXT:
        return cursor.text()
    if kind == ARRAY:
        (kind,), (count,) = cursor.numbers("I"), cursor.numbers("Q")
        if kind in SCALARS:
            return list(cursor.numbers(SCALARS[kind], count))
        if kind == TEXT:
            return cursor.texts(count)
    raise _Damaged(f"{shown(key)} has a value of kind {kind}")


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, quantization, shape and offset of one tensor."""
    name = cursor.text()
    (axes,) = cursor.numbers("I")
    if axes > MOST_AXES:
        raise _Damaged(f"{shown(name)} has {axes} axes, expected at most {MOST_AXES}")
    shape = tuple(reversed(cursor.numbers("Q", axes)))  # the format has the fastest axis first
    (kind,), (offset,) = cursor.numbers("I"), cursor.numbers("Q")
    return name, kind, shape, offset


def _bytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    """The bytes that a tensor takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in {int(known) for known in GGMLQuantizationType}:
        raise _Damaged(
            f"{shown(name)} has the quantization {kind}, which the gguf package does not know"
        )
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape and shape[-1] % block:
        raise _Damaged(f"{shown(name)} has rows of {shape[-1]} numbers in blocks of {block}")
    return math.prod(shape) // block * size
