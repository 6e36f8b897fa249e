"""kvjax's own layout: kvjax.json with the configuration, params/ with orbax arrays.

Every layer is an orbax checkpoint of its own, so that a model can be written and read layer by
layer.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

import kvjax.config
from kvjax import processes
from kvjax.config import ModelConfig
from kvjax.hf.json_file import read_json
from kvjax.hf.lazy import LazyParams
from kvjax.hf.native_fields import part_problems
from kvjax.nn import Transformer
from kvjax.sharding import param_shapes

CONFIG = "kvjax.json"
PARAMS = "params"
VERSION = 2


def is_native(directory: Path) -> bool:
    """Whether a directory has this layout."""
    return (directory / CONFIG).is_file()


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a saved model.

    Raises:
        ValueError: a file that is damaged or that another version of kvjax wrote.
    """
    try:
        content = read_json(directory / CONFIG)[1]
        version = content["version"]
        if version == VERSION:
            problems = list(part_problems(content["model"], ModelConfig))
            if not problems:
                return decode(content["model"])
            raise ValueError("; ".join(problems))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory / CONFIG} is no model configuration: {error}") from None
    raise ValueError(f"{directory / CONFIG} has version {version}, expected {VERSION}")


def read_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> dict[str, Any]:
    """The parameters, in the target dtype and where they shall lie; see `weights.read_params`.

    Raises:
        ValueError: names every missing, unexpected or misshapen parameter.
    """
    return dict(open_params(model, directory, dtype, shardings))


def open_params(
    model: Transformer, directory: Path, dtype: np.dtype, shardings: Any = None
) -> LazyParams:
    """As `read_params`, but each part is read when it is asked for, and not kept."""
    import orbax.checkpoint as ocp

    expected = param_shapes(model)
    if shardings is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, expected)
    path = (directory / PARAMS).absolute()
    if not path.is_dir():
        raise ValueError(f"cannot load {directory}: missing {PARAMS}/")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = {
            part.name: checkpointer.metadata(part).item_metadata.tree[part.name]
            for part in sorted(path.iterdir())
        }
    problems = _compare(expected, stored)
    if problems:
        raise ValueError(f"cannot load {directory}: {'; '.join(problems)}")

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
    """Writes one layer, or one parameter that belongs to no layer."""
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / PARAMS / name).absolute(), {name: part})


def write_config(model: Transformer, directory: Path) -> None:
    """Writes the configuration, after all parts: a directory that has it is complete."""
    # Where the model came from means nothing elsewhere.
    config = dataclasses.replace(model.config, source="")
    content = {"version": VERSION, "model": encode(config)}
    (directory / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
    return cls(**fields)


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
