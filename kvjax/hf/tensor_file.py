"""safetensors files as lazily read numpy arrays.

The safetensors package knows no bfloat16 in numpy and copies what it slices. Here a tensor is a
view of the mapped file: reshaping, slicing and transposing cost nothing, and only what is copied
out of it is read. A file is 8 bytes with the length of a JSON header, the header, then the data.
"""

import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.hf.json_file import is_pointer, pointer_message

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
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


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file; `start` is its first byte."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, file: np.ndarray) -> np.ndarray:
        """The tensor within the bytes of its file, see `map_file`; nothing is read."""
        data = file[self.start : self.start + self.nbytes]
        return data.view(self.dtype).reshape(self.shape)

    def open(self) -> np.ndarray:
        """The tensor as a read-only view of its file, mapped for it alone."""
        return self.view(map_file(self.path))


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `values` makes it when its turn comes."""

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
    """Lets go of the pages of a mapped file; what is read again comes from the disk or its cache.

    Otherwise a process that reads a checkpoint part by part holds all of it in the end.
    """
    mapping: Any = file
    while isinstance(mapping, np.ndarray):
        mapping = mapping.base
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, none of them read.

    The rules are those of the format: the tensors follow each other without holes and overlaps and
    end where the file ends, and no name comes twice.

    Raises:
        ValueError: a git-lfs pointer, no safetensors file, a truncated one, or an unknown dtype.
    """
    size = path.stat().st_size
    if is_pointer(path):
        raise ValueError(pointer_message(path.name))
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start - 8 > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file: a header of {start - 8} bytes")
        if size < 8 or start > size:
            raise ValueError(f"{path.name} is truncated: {size} bytes end within the header")
        try:
            header = json.loads(file.read(start - 8), object_pairs_hook=_without_duplicates)
            if not isinstance(header, dict):
                raise ValueError(f"its header is a {type(header).__name__}, expected an object")
            _check_metadata(header.pop("__metadata__", None))
            tensors = {name: _stored(path, start, entry) for name, entry in header.items()}
            end = _end(tensors, start)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from None
    if end > size:
        raise ValueError(f"{path.name} is truncated: got {size} bytes, expected {end}")
    if end < size:
        raise ValueError(f"{path.name} is damaged: got {size} bytes, expected {end}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice[0]!r} comes twice in its header")
    return found


def _check_metadata(metadata: Any) -> None:
    """Texts by name; the format also has null for none."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")


def _stored(path: Path, start: int, entry: Any) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    (first, end), shape = entry["data_offsets"], entry["shape"]
    if not all(type(number) is int and number >= 0 for number in (first, end, *shape)):
        raise ValueError(f"shape {shape} at {[first, end]}, expected numbers from 0")
    dtype = DTYPES[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - first:
        raise ValueError(f"{end - first} bytes for shape {tuple(shape)} {entry['dtype']}")
    return StoredTensor(path, dtype, tuple(shape), start + first)


def _end(tensors: Mapping[str, StoredTensor], start: int) -> int:
    """Where the last tensor ends; each begins where the one before it ends."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            problem = "overlaps another tensor" if tensor.start < end else "follows a hole"
            got, expected = tensor.start - start, end - start
            raise ValueError(f"{name} {problem}: begins at byte {got}, expected {expected}")
        end += tensor.nbytes
    return end


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header; call `read_header` first, which checks the file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__") or {}


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
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.values(), dtype=tensor.dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
