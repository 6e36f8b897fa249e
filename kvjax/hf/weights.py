"""Parameters from the tensors of a checkpoint, and back."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from kvjax import processes
from kvjax.checkpoint_files import (
    DTYPES,
    MAX_SHARD_BYTES,
    PIECE_BYTES,
    Checkpoint,
    NewTensor,
    StoredTensor,
    collapsed,
    scan,
    write,
)
from kvjax.fields import refuse
from kvjax.hf.layout import (
    EMBEDDING,
    HEAD,
    Layout,
    ParamPath,
    Shape,
    Tensor,
    canonical,
    layouts,
    other_names,
    tensors,
)
from kvjax.nn import Transformer, param_shapes

BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")
"""Tensors in some checkpoints that are not parameters."""
WEIGHT_DTYPES = tuple(DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))
"""Dtypes that are read as weights. 8-bit floats and integers would need their scales."""
ALIGNMENT = 64


def read_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of a checkpoint, in the target dtype and shardings.

    Headers, index and file sizes are compared with the model first. Then each device's part of each
    parameter is copied from the mapped file to the device.

    Args:
        shardings: from `kvjax.sharding.param_shardings`; None: the default device.

    Raises:
        ValueError: names every missing, unexpected or misshapen tensor, and every missing or
            truncated file.
    """
    return dict(open_params(model, directory, dtype, shardings))


def open_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> LazyParams:
    """Like `read_params`, but each access reads one part from disk again; nothing is cached."""
    forms = layouts(model.config)
    return open_checkpoint(model, scan(directory), forms, directory, dtype, shardings)


def open_checkpoint(
    model: Transformer,
    checkpoint: Checkpoint,
    forms: Sequence[Layout],
    place: Path,
    dtype: np.dtype,
    shardings: Any = None,
) -> LazyParams:
    """The parameters in the tensors of a checkpoint, each part read when it is accessed.

    Args:
        forms: the layouts in which the family's checkpoints are written.
        place: names the checkpoint in errors.
        dtype, shardings: see `read_params`.

    Raises:
        ValueError: see `read_params`.
    """
    # Report every fault before the first byte of a tensor is read.
    shapes = _flat_shapes(model)
    expected, checkpoint = _expected(model, shapes, checkpoint, forms)
    unfit = (f"{place}: {line}" for line in _compare(model, expected, checkpoint))
    refuse([*checkpoint.problems, *unfit])
    groups = _groups(expected)
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        targets = dict.fromkeys(shapes, here)
    else:
        targets = _flatten(shardings)

    def read(name: str) -> Any:
        part = {}
        for paths, group in groups[name].items():
            # Opening a quantized tensor makes its numbers: only those of one group are in memory.
            views = _views(group, checkpoint)
            for path in paths:
                to = dtype, targets[path]
                part[path] = _place(views[path], shapes[path], *to, checkpoint.release)
            del views
            checkpoint.release()
        return unflatten_dict(part)[name]

    return LazyParams(dict.fromkeys(path[0] for path in shapes), read)


def write_params(
    model: Transformer, params: Any, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes safetensors in the family's layout, in the dtype of the parameters.

    One of several processes writes. All processes contribute their parts of each tensor in turn.

    Raises:
        ValueError: the layout cannot express the model.
    """
    flat = _flatten(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    expected = tensors(model.config, shapes, layouts(model.config)[0])

    def new(tensor: Tensor) -> NewTensor:
        def values() -> np.ndarray:
            leaves = [flat[path] for path in tensor.params]
            if tensor.expert is not None:  # only this one comes to the host
                leaves = [leaf[tensor.expert] for leaf in leaves]
            return tensor.merge([_to_host(leaf) for leaf in leaves])

        return NewTensor(tensor.name, np.dtype(flat[tensor.params[0]].dtype), tensor.shape, values)

    written = [new(tensor) for tensor in expected]
    if processes.is_writer():
        write(directory, written, max_shard_bytes)
        return
    # The other processes take part in the same collectives, in the same order.
    for tensor in written:
        tensor.values()


def _to_host(leaf: Any) -> np.ndarray:
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def _flatten(tree: Any) -> dict[ParamPath, Any]:
    return cast(dict[ParamPath, Any], flatten_dict(tree))


def _flat_shapes(model: Transformer) -> dict[ParamPath, Shape]:
    return {path: leaf.shape for path, leaf in _flatten(param_shapes(model.config)).items()}


def _expected(
    model: Transformer,
    shapes: dict[ParamPath, Shape],
    checkpoint: Checkpoint,
    forms: Sequence[Layout],
) -> tuple[list[Tensor], Checkpoint]:
    """The tensors of the family's layout that fits the checkpoint best.

    Also returns the checkpoint with the layout's names, see `kvjax.hf.layout.canonical`.
    """
    found = []  # (number of tensors that are present, the layout's tensors, renamed checkpoint)
    for layout in forms:
        expected = tensors(model.config, shapes, layout)
        known = {tensor.name for tensor in expected} | {HEAD}
        renamed = checkpoint.renamed(functools.partial(canonical, expected=known))
        if model.config.tie_embeddings:
            renamed = embedding_from_head(renamed)
        present = renamed.tensors.keys() | renamed.lost
        found.append((sum(tensor.name in present for tensor in expected), expected, renamed))
    _, expected, renamed = max(found, key=lambda entry: entry[0])
    return expected, renamed


def embedding_from_head(checkpoint: Checkpoint) -> Checkpoint:
    """Renames the output matrix to the embedding, for a tied checkpoint without an embedding."""
    held = checkpoint.tensors
    if HEAD not in held or EMBEDDING in held or EMBEDDING in checkpoint.lost:
        return checkpoint
    return checkpoint.renamed(lambda name: EMBEDDING if name == HEAD else name)


def _compare(model: Transformer, expected: list[Tensor], checkpoint: Checkpoint) -> list[str]:
    """A line for each difference between the stored tensors and the model."""
    stored, wrong, missing = checkpoint.tensors, [], []
    for tensor in expected:
        if tensor.name in stored:
            wrong += _unfit(tensor, stored[tensor.name])
        elif tensor.name not in checkpoint.lost:
            wrong.append(("missing ", tensor.name, ""))
            missing.append(tensor.name)
    ignored = {HEAD} if model.config.tie_embeddings else set()
    surplus = stored.keys() - {tensor.name for tensor in expected} - ignored
    surplus = [name for name in sorted(surplus) if not BUFFERS.search(name)]
    wrong += (("unexpected ", name, "") for name in surplus)
    renamed, lines = other_names(missing, surplus)
    return lines + collapsed(entry for entry in wrong if entry[1] not in renamed)


def _unfit(tensor: Tensor, stored: StoredTensor) -> Iterator[tuple[str, str, str]]:
    if stored.shape != tensor.shape:
        yield "", tensor.name, f" has shape {stored.shape}, expected {tensor.shape}"
    if stored.dtype not in WEIGHT_DTYPES:
        names = ", ".join(dtype.name for dtype in WEIGHT_DTYPES)
        yield "", tensor.name, f" holds {stored.dtype.name}, expected one of {names}"


def _groups(expected: list[Tensor]) -> dict[str, dict[tuple[ParamPath, ...], list[Tensor]]]:
    """The tensors of each top-level part, those together that hold the same parameters."""
    groups: dict[str, dict[tuple[ParamPath, ...], list[Tensor]]] = {}
    for tensor in expected:
        part = groups.setdefault(tensor.params[0][0], {})
        part.setdefault(tensor.params, []).append(tensor)
    return groups


def _views(expected: list[Tensor], checkpoint: Checkpoint) -> dict[ParamPath, list[np.ndarray]]:
    """For each parameter its view of the file, or the views of its experts in order."""
    views: dict[ParamPath, list[np.ndarray]] = defaultdict(list)
    for tensor in expected:
        parts = tensor.split(checkpoint.open(tensor.name))
        for path, part in zip(tensor.params, parts, strict=True):
            views[path].append(part)
    return views


def _place(
    views: list[np.ndarray],
    shape: Shape,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    release: Callable[[], None],
) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        """The part of the parameter that one device holds: the only copy on the host."""
        index = index or (slice(None),) * len(shape)
        if views[0].ndim == len(shape):
            part = views[0][index]
            out = _aligned(part.shape, dtype)
            _copy(part, out, release)
            return out
        experts = [view[index[1:]] for view in views[index[0]]]
        out = _aligned((len(experts), *experts[0].shape), dtype)
        for expert, view in zip(out, experts, strict=True):
            _copy(view, expert, release)
        return out

    return jax.make_array_from_callback(shape, sharding, read)


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An uninitialized array, aligned so that jax's CPU backend uses it without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(source: np.ndarray, out: np.ndarray, release: Callable[[], None]) -> None:
    """Copies a view of a mapped file piece by piece, and releases the pages of each piece."""
    if source.nbytes <= PIECE_BYTES:
        out[...] = source
        return
    # Cut along the axis with the largest stride, so that a piece is contiguous in the file.
    axis = int(np.argmax(source.strides))
    step = max(1, PIECE_BYTES * source.shape[axis] // source.nbytes)
    for start in range(0, source.shape[axis], step):
        piece = (slice(None),) * axis + (slice(start, start + step),)
        out[piece] = source[piece]
        release()


class LazyParams(Mapping[str, Any]):
    """The top level of a params dict. Each `params["layers_3"]` reads that layer from disk.

    Code that works layer by layer (`kvjax.transmla.calibrate`, the conversion) then has one layer
    in memory at a time.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]):
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
