"""safetensors files as lazily read numpy arrays.

The safetensors package knows no bfloat16 in numpy and copies what it slices. Here a tensor is a
view of the mapped file: reshaping, slicing and transposing cost nothing, and only what is copied
out of it is read. A file is 8 bytes with the length of a JSON header, the header, then the data.
"""

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

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

    Raises:
        ValueError: no safetensors file, a truncated one, or an unknown dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{path.name} is truncated: {size} bytes end within the header")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, start, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} is no safetensors file: {error}") from None
    end = max((t.start + t.nbytes for t in tensors.values()), default=start)
    if end > size:
        raise ValueError(f"{path.name} is truncated: got {size} bytes, expected {end}")
    return tensors


def _stored(path: Path, start: int, entry: Mapping) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    first, end = entry["data_offsets"]
    tensor = StoredTensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
    if tensor.nbytes != end - first:
        raise ValueError(f"{end - first} bytes for shape {tensor.shape} {entry['dtype']}")
    return tensor


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a file's header; call `read_header` first, which checks the file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})


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
