"""kvjax's own layout: kvjax.json with the configuration, params/ with orbax arrays.

Every layer is an orbax checkpoint, so that a model can be written and read layer by layer."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

import kvjax.config
from kvjax import processes
from kvjax.config import ModelConfig
from kvjax.fields import Object, fits, hints, members, object_problems, plain, refuse, shown, words
from kvjax.hf.source import CONFIG, PARAMS
from kvjax.hf.weights import LazyParams
from kvjax.nn import Transformer, param_shapes
from kvjax.runs import write_whole
from kvjax.text_files import read_object

VERSION = 2
FIELDS = {"version": Literal[VERSION], "model": Object}
"""Fields of kvjax.json; those of the model are the attributes of `ModelConfig`."""


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a saved model.

    Raises:
        ValueError: the file is damaged, or an incompatible version of kvjax wrote it.
    """
    path = directory / CONFIG
    content = read_object(path)
    refuse(object_problems(content, FIELDS, others=False), str(path))
    refuse(part_problems(content["model"], ModelConfig), str(path))
    return decode(content["model"])


def read_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> dict[str, Any]:
    """The parameters in the target dtype and shardings; see `weights.read_params`.

    Raises:
        ValueError: names every missing, unexpected or misshapen parameter.
    """
    return dict(open_params(model, directory, dtype, shardings))


def open_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> LazyParams:
    """Like `read_params`, but each access reads one part from disk again; nothing is cached."""
    import orbax.checkpoint as ocp

    expected = param_shapes(model.config)
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, expected)
    path = (directory / PARAMS).absolute()
    if not path.is_dir():
        raise ValueError(f"{directory}: missing {PARAMS}/")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = {
            part.name: checkpointer.metadata(part).item_metadata.tree[part.name]
            for part in sorted(path.iterdir())
        }
    problems = _compare(expected, stored)
    refuse(problems, str(directory))

    # orbax restores straight into the target dtype and sharding: no second copy on the host.
    def read(name: str) -> Any:
        targets = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
            expected[name],
            shardings[name],
        )
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / name, {name: targets})[name]

    return LazyParams(expected, read)


def write(model: Transformer, params: Any, directory: Path) -> None:
    """Writes a model to a new directory."""
    for name in params:
        write_part(directory, name, params[name])
    if processes.is_writer():
        write_config(model, directory)


def write_part(directory: Path, name: str, part: Any) -> None:
    """Writes one layer, or one parameter that belongs to no layer.

    Raises:
        OSError: a full disk, for which tensorstore has a ValueError.
    """
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((directory / PARAMS / name).absolute(), {name: part})
    except ValueError as error:
        raise OSError(f"cannot write {directory / PARAMS / name}: {error}") from error


def write_config(model: Transformer, directory: Path) -> None:
    """Writes the configuration, after all parts: a directory that has it is complete."""
    # The source directory of the model means nothing on another machine.
    config = dataclasses.replace(model.config, source="")
    content = {"version": VERSION, "model": encode(config)}
    write_whole(directory / CONFIG, json.dumps(content, indent=1) + "\n")


def encode(value: Any) -> Any:
    """A configuration as JSON: a dataclass becomes an object with its class's name as "type"."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(value: Any) -> Any:
    """The inverse of `encode`, for the dataclasses of kvjax.config."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: decode(item) for name, item in value.items()}
    name = fields.pop("type")
    cls = getattr(kvjax.config, name, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"unknown part {name!r}")
    return cls(**{name: _real(part, hints(cls)[name]) for name, part in fields.items()})


def _real(value: Any, kind: Any) -> Any:
    """The value; a whole number as a float, where its type is that of real numbers."""
    kinds = [plain(each) for each in members(kind)]
    if isinstance(value, tuple) and typing.get_origin(kinds[0]) is tuple:
        return tuple(_real(part, typing.get_args(kinds[0])[0]) for part in value)
    return float(value) if type(value) is int and float in kinds else value


def _compare(expected: Any, stored: Any) -> list[str]:
    want, got = _shapes(expected), _shapes(stored)
    problems = [f"missing {name}" for name in want.keys() - got.keys()]
    problems += [f"unexpected {name}" for name in got.keys() - want.keys()]
    problems += [
        f"{name} has shape {got[name]}, expected {want[name]}"
        for name in want.keys() & got.keys()
        if want[name] != got[name]
    ]
    return sorted(problems)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def part_problems(value: Any, hint: Any, place: str = "model") -> Iterator[str]:
    """A line for each value, at any depth, with the wrong type or outside its range.

    Args:
        hint: the declared type: a dataclass of kvjax.config, or the type of one of its fields.
        place: path of the value, which starts the line.
    """
    # A field such as MLPConfig | MoEConfig | None allows a value of any of its kinds.
    kinds = members(hint)
    if isinstance(value, dict):
        found = [kind for kind in kinds if getattr(kind, "__name__", "") == value.get("type")]
        if not found:
            got = shown(value.get("type"))
            yield f"{place} is an unknown part {got}, expected {words(hint)}"
            return
        yield from _field_problems(value, found[0], place)
    elif isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        entry = next(typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple)
        for index, one in enumerate(value):
            yield from part_problems(one, entry, f"{place}[{index}]")
    elif not fits(value, hint):
        yield f"{place} is {shown(value)}, expected {words(hint)}"


def _field_problems(value: dict[str, Any], cls: type, place: str) -> Iterator[str]:
    kinds = hints(cls)
    for name in sorted(value.keys() - kinds.keys() - {"type"}):
        yield f"{place} has an unknown field {shown(name)}"
    for field in dataclasses.fields(cls):
        if field.name in value:
            yield from part_problems(value[field.name], kinds[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING:
            yield f"{place} has no {field.name}"
