"""The files of a checkpoint: safetensors as lazily read numpy arrays, their index, JSON objects.

The safetensors package has no bfloat16 in numpy and copies what is sliced. Here a tensor is a view
of the mapped file: reshaping, slicing and transposing cost nothing, and only the parts that are
copied are read. A file is 8 bytes with the length of a JSON header, the header, then the data.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from annotated_types import Ge, Le

from kvjax.fields import Object, OneOf, Says, Text, build, object_problems, refuse, shown, within
from kvjax.paths import is_inside, replacing
from kvjax.text_files import is_pointer, parse_object, pointer_message, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 4 << 20
"""Bytes of a mapped file to read before its pages are released. This size transposes fastest."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory.

    Attributes:
        tensors: by name.
        problems: a line for each fault of the files.
        lost: names that the index gives to files that are missing or damaged.
    """

    tensors: dict[str, StoredTensor]
    problems: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()

    @functools.cached_property
    def _files(self) -> dict[Path, np.ndarray]:
        # One mapping per file: thousands of expert tensors would exceed what a process may map.
        return {path: map_file(path) for path in {t.path for t in self.tensors.values()}}

    def open(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in its mapped file."""
        tensor = self.tensors[name]
        return tensor.view(self._files[tensor.path])

    def renamed(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors with new names, except where the new name already exists."""
        tensors = dict(self.tensors)
        for name in self.tensors:
            new = rename(name)
            if new not in tensors:
                tensors[new] = tensors.pop(name)
        return replace(self, tensors=tensors, lost=frozenset(map(rename, self.lost)))

    def release(self) -> None:
        """Frees the memory of the pages that were read so far; views stay valid."""
        for file in self._files.values():
            release(file)


def scan(directory: Path) -> Checkpoint:
    """Headers of all files; no tensor is read.

    If there are both a single file and an index, the single file is read, as in transformers.

    Raises:
        ValueError: there are no safetensors, or the index is not JSON.
    """
    if (directory / SINGLE).is_file():
        return Checkpoint(read_header(directory / SINGLE))
    if not (directory / INDEX).is_file():
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
    return _scan_index(directory)


def _scan_index(directory: Path) -> Checkpoint:
    index = directory / INDEX
    # An index from the hub is untrusted input: it must not make a load read other files.
    weight_map = read_index(index)
    outside = {t: file for t, file in weight_map.items() if not is_inside(file)}
    problems = collapsed(
        (f"{index}: ", tensor, f" is in {shown(file)}, expected a file in the directory")
        for tensor, file in outside.items()
    )
    weight_map = {t: file for t, file in weight_map.items() if t not in outside}
    tensors: dict[str, StoredTensor] = {}
    lost = set(outside)
    for name in sorted(set(weight_map.values())):
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        if not os.path.isfile(directory / name):  # also false for a name too long for a file
            problems.append(f"{index}: missing shard {name} ({len(promised)} tensors)")
            lost |= promised
            continue
        try:
            found = read_header(directory / name)
        except ValueError as error:
            problems += str(error).splitlines()
            lost |= promised
            continue
        absent = sorted(promised - set(found))
        problems += collapsed((f"{index} expects ", t, f" in {name}") for t in absent)
        for tensor, stored in found.items():
            if weight_map.get(tensor, name) != name:
                continue  # the index takes this tensor from another file
            if tensor in tensors:
                problems.append(f"{index} has no {tensor}, which is in several shards")
            tensors[tensor] = stored
    return Checkpoint(tensors, tuple(problems), frozenset(lost))


def read_index(path: Path) -> dict[str, Any]:
    """The files of all tensors by name, as the index has them.

    Raises:
        ValueError: the file is not an index.
    """
    raw = read_object(path)
    refuse(object_problems(raw, {"weight_map": Object}), str(path))
    return raw["weight_map"]


def leftovers(directory: Path) -> list[str]:
    """Names of the weight files in a directory; a later save would mix its files with them."""
    found = {path.name for pattern in WEIGHTS for path in directory.glob(pattern)}
    return sorted(found)


def write(
    directory: Path, tensors: Iterable[NewTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """One safetensors file, or several and their index where one would exceed the limit."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with replacing(directory / INDEX) as file:
        file.write(f"{json.dumps(index, indent=2)}\n".encode())


def _shards(tensors: Iterable[NewTensor], limit: int) -> Sequence[list[NewTensor]]:
    shards: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


# --- One file ----------------------------------------------------------------------------------

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_BYTES = 2**63 - 1
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Place = Annotated[int, Ge(0), Le(MAX_BYTES), Says("a whole number of at least 0")]


@dataclass(frozen=True)
class Entry:
    """A tensor in a header; its last byte is not part of it."""

    dtype: Annotated[str, OneOf(tuple(DTYPES))]
    shape: tuple[Place, ...]
    data_offsets: tuple[Place, Place]


METADATA = Annotated[dict[str, Text] | None, Says("an object of texts")]


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file; `start` is its first byte."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def stored_as(self) -> str:
        """The name of the type in which the file has the numbers."""
        return self.dtype.name

    def view(self, file: np.ndarray) -> np.ndarray:
        """The tensor within the bytes of its file, see `map_file`; nothing is read."""
        data = file[self.start : self.start + self.nbytes]
        return data.view(self.dtype).reshape(self.shape)

    def open(self) -> np.ndarray:
        """The tensor as a read-only view of its file, mapped for it alone."""
        return self.view(map_file(self.path))


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `values` is called when the tensor is written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped read-only."""
    return np.asarray(np.memmap(path, mode="r", dtype=np.uint8))


def release(file: np.ndarray) -> None:
    """Frees the pages of a mapped file. A later read takes them from the disk or its cache again.

    Without this, a process that reads a checkpoint part by part ends up with all of it in memory.
    """
    mapping: Any = file
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file; see `read_head`."""
    return read_head(path)[0]


def read_head(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file, and the texts in its header; only the header is read.

    The format requires tensors without holes and overlaps up to the end of the file, and unique
    names.

    Raises:
        ValueError: the file is a git-lfs pointer, not safetensors, truncated, or has an unknown
            dtype.
    """
    size = path.stat().st_size
    if is_pointer(path):
        raise ValueError(pointer_message(path))
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start - 8 > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: a header of {start - 8} bytes")
        if size < 8 or start > size:
            raise ValueError(f"{path} is truncated: its {size} bytes end within the header")
        text = file.read(start - 8)
    with within(f"{path} is not a safetensors file"):
        header = parse_object(text, "its header")
        texts = build(METADATA, header.pop("__metadata__", None), "its __metadata__")
        entries = build(dict[str, Entry], header, "its header", others=True)
        tensors = {name: _stored(path, start, entry) for name, entry in entries.items()}
        end = _end(tensors, start)
    if end > size:
        raise ValueError(f"{path} is truncated: got {size} bytes, expected {end}")
    if end < size:
        raise ValueError(f"{path} is damaged: got {size} bytes, expected {end}")
    return tensors, texts or {}


def _stored(path: Path, start: int, entry: Entry) -> StoredTensor:
    (first, end), shape, dtype = entry.data_offsets, entry.shape, DTYPES[entry.dtype]
    if math.prod(shape) * dtype.itemsize != end - first:
        raise ValueError(f"{end - first} bytes for shape {shape} {entry.dtype}")
    return StoredTensor(path, dtype, shape, start + first)


def _end(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """The byte after the last tensor. Every tensor must begin where the previous one ends."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            problem = "overlaps another tensor" if tensor.start < end else "follows a hole"
            got, expected = tensor.start - start, end - start
            raise ValueError(f"{name} {problem}: begins at byte {got}, expected {expected}")
        end += tensor.nbytes
    return end


def write_file(
    path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, one tensor in memory at a time."""
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.values(), dtype=tensor.dtype)
            file.write(values.reshape(-1).view(np.uint8).data)


# --- Lists of tensors in an error --------------------------------------------------------------

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # the layer's or expert's
FEW = 3


def collapsed(problems: Iterable[tuple[str, str, str]]) -> list[str]:
    """Lines before + name + after, one line for names that differ only in their numbers.

    >>> collapsed(("missing ", f"layers.{i}.q", "") for i in (0, 1, 2, 5))
    ['missing layers.{0-2,5}.q']
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for before, name, after in problems:
        groups.setdefault((before, NUMBER.sub("#", name), after), []).append(name)
    lines = []
    for (before, _, after), names in groups.items():
        lines += [f"{before}{name}{after}" for name in names[:FEW]] if len(names) <= FEW else []
        if len(names) > FEW:
            lines.append(f"{before}{_joined(names)}{after}")
    return lines


def _joined(names: list[str]) -> str:
    """layers.{0-31}.q for layers.0.q to layers.31.q."""
    numbers = [sorted(set(column)) for column in zip(*map(_numbers, names), strict=True)]
    texts = iter(_ranges(column) for column in numbers)
    joined = NUMBER.sub(lambda _: next(texts), names[0])
    whole = math.prod(len(column) for column in numbers) == len(names)
    return joined if whole else f"{joined} ({len(names)} tensors)"


def _numbers(name: str) -> list[int]:
    return [int(number) for number in NUMBER.findall(name)]


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    found = []
    for _, run in runs:
        members = [number for _, number in run]
        found.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return "{" + ",".join(found) + "}"
