"""The safetensors files of a directory: found, checked against each other, written."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from kvjax.hf.fields import shown
from kvjax.hf.json_file import read_json
from kvjax.hf.problems import collapsed
from kvjax.hf.tensor_file import NewTensor, StoredTensor, map_file, read_header, release, write_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
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

    def renamed(self, rename: Callable[[str], str]) -> "Checkpoint":
        """The same files under other names for the tensors; a name that is there already stays."""
        tensors = dict(self.tensors)
        for name in self.tensors:
            new = rename(name)
            if new not in tensors:
                tensors[new] = tensors.pop(name)
        return replace(self, tensors=tensors, lost=frozenset(map(rename, self.lost)))

    def release(self) -> None:
        """Lets go of the pages that were read so far; views stay valid."""
        for file in self._files.values():
            release(file)


def scan(directory: Path) -> Checkpoint:
    """Headers of all files; no tensor is read.

    Where there is a single file and an index, the single file counts, as in transformers.

    Raises:
        ValueError: no safetensors at all, or an index that is no JSON.
    """
    if (directory / SINGLE).is_file():
        try:
            return Checkpoint(read_header(directory / SINGLE))
        except ValueError as error:
            raise ValueError(f"cannot load {directory}: {error}") from None
    if not (directory / INDEX).is_file():
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
    return _scan_index(directory)


def _scan_index(directory: Path) -> Checkpoint:
    weight_map = read_index(directory / INDEX)
    outside = {t: file for t, file in weight_map.items() if not _is_inside(file)}
    problems = collapsed(
        ("", tensor, f" is in {shown(file)}, expected a file in the directory")
        for tensor, file in outside.items()
    )
    weight_map = {t: file for t, file in weight_map.items() if t not in outside}
    tensors: dict[str, StoredTensor] = {}
    lost = set(outside)
    for name in sorted(set(weight_map.values())):
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        if not os.path.isfile(directory / name):  # also false for a name too long for a file
            problems.append(f"missing shard {name} ({len(promised)} tensors)")
            lost |= promised
            continue
        try:
            found = read_header(directory / name)
        except ValueError as error:
            problems.append(str(error))
            lost |= promised
            continue
        absent = sorted(promised - set(found))
        problems += collapsed(("the index expects ", t, f" in {name}") for t in absent)
        for tensor, stored in found.items():
            if weight_map.get(tensor, name) != name:
                continue  # a copy, which the index does not ask for
            if tensor in tensors:
                problems.append(f"{tensor} is in several shards and not in the index")
            tensors[tensor] = stored
    return Checkpoint(tensors, tuple(problems), frozenset(lost))


def read_index(path: Path) -> dict[str, Any]:
    """The files of all tensors by name, as the index has them.

    Raises:
        ValueError: no index.
    """
    weight_map = read_json(path)[1].get("weight_map")
    if not isinstance(weight_map, dict):
        got = type(weight_map).__name__
        raise ValueError(f"{path} is no index: its weight_map is a {got}, expected an object")
    return weight_map


def _is_inside(file: Any) -> bool:
    """Whether a name is one of a file below the directory of the index."""
    if not isinstance(file, str) or not file or "\0" in file:
        return False
    paths = PurePosixPath(file), PureWindowsPath(file)
    return not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def leftovers(directory: Path) -> list[str]:
    """Names of weights that lie in a directory: what a save there would be mixed up with."""
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
