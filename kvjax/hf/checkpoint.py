"""The safetensors files of a directory: found, checked against each other, written."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvjax.hf.tensor_file import NewTensor, StoredTensor, map_file, read_header, release, write_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds.

    Attributes:
        tensors: by name.
        problems: what is wrong with its files.
        lost: names that the index promises in files that are missing or damaged.
    """

    tensors: dict[str, StoredTensor]
    problems: tuple[str, ...] = ()
    lost: frozenset[str] = frozenset()

    @functools.cached_property
    def _files(self) -> dict[Path, np.ndarray]:
        # One mapping a file: thousands of expert tensors would exceed what a process may map.
        return {path: map_file(path) for path in {t.path for t in self.tensors.values()}}

    def open(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in its mapped file."""
        tensor = self.tensors[name]
        return tensor.view(self._files[tensor.path])

    def release(self) -> None:
        """Lets go of the pages that were read so far; views stay valid."""
        for file in self._files.values():
            release(file)


def scan(directory: Path) -> Checkpoint:
    """Headers of all files; no tensor is read.

    Raises:
        ValueError: no safetensors at all, or an index that is no JSON.
    """
    if (directory / INDEX).is_file():
        return _scan_index(directory)
    if not (directory / SINGLE).is_file():
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
    try:
        return Checkpoint(read_header(directory / SINGLE))
    except ValueError as error:
        raise ValueError(f"cannot load {directory}: {error}") from None


def _scan_index(directory: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{directory / INDEX} is no index: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    lost: set[str] = set()
    for name in sorted(set(weight_map.values())):
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        if not (directory / name).is_file():
            problems.append(f"missing shard {name} ({len(promised)} tensors)")
            lost |= promised
            continue
        try:
            found = read_header(directory / name)
        except ValueError as error:
            problems.append(str(error))
            lost |= promised
            continue
        problems += [f"the index expects {t} in {name}" for t in sorted(promised - set(found))]
        tensors |= found
    return Checkpoint(tensors, tuple(problems), frozenset(lost))


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
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
