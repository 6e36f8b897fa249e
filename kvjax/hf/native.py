"""kvjax's own layout: kvjax.json with the configuration, params/ with orbax arrays.

Every layer is an orbax checkpoint, so that a model can be written and read layer by layer."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

import kvjax.config
from kvjax import processes
from kvjax.checkpoint_files import read_json, shown
from kvjax.config import ModelConfig
from kvjax.hf.fields import ACTIVATIONS, LARGEST_REAL, TOKEN, count
from kvjax.hf.source import CONFIG, PARAMS
from kvjax.hf.weights import LazyParams
from kvjax.nn import Transformer, param_shapes
from kvjax.runs import write_whole

VERSION = 2


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a saved model.

    Raises:
        ValueError: the file is damaged, or an incompatible version of kvjax wrote it.
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
        raise ValueError(f"{directory / CONFIG} is not a model configuration: {error}") from None
    raise ValueError(f"{directory / CONFIG} has version {version}, expected {VERSION}")


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
        raise ValueError(f"cannot load {directory}: missing {PARAMS}/")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = {
            part.name: checkpointer.metadata(part).item_metadata.tree[part.name]
            for part in sorted(path.iterdir())
        }
    problems = _compare(expected, stored)
    if problems:
        raise ValueError(f"cannot load {directory}: {'; '.join(problems)}")

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
    """Writes one layer, or one parameter that belongs to no layer."""
    import orbax.checkpoint as ocp

    directory.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / PARAMS / name).absolute(), {name: part})


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


COUNTS = (
    *("vocab_size", "hidden_size", "max_position_embeddings"),
    *("num_heads", "num_kv_heads", "head_dim", "window", "width", "num_experts", "top_k"),
    *("latent_heads", "key_rank", "value_rank", "rank", "kv_lora_rank", "q_lora_rank"),
    *("v_head_dim", "original_length"),
)
POSITIVE = (
    *("theta", "scale", "softcap", "final_softcap"),
    *("factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow"),
)
NAMES = {
    "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
    "qk_norm": ("head", "all"),
    "rope_site": ("after_up", "before_up"),
}
"""Fields that name one of several ways to compute, with the valid names."""


def part_problems(value: Any, hint: Any, place: str = "model") -> Iterator[str]:
    """A line for each value, at any depth, with the wrong type or outside its range.

    Args:
        hint: the declared type: a dataclass of kvjax.config, or the type of one of its fields.
        place: path of the value, which starts the line.
    """
    # A field such as MLPConfig | MoEConfig | None allows a value of any of its kinds.
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, dict):
        found = [kind for kind in kinds if getattr(kind, "__name__", "") == value.get("type")]
        if not found:
            got = shown(value.get("type"))
            yield f"{place} is an unknown part {got}, expected {_words(hint)}"
            return
        yield from _field_problems(value, found[0], place)
    elif isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        entry = next(typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple)
        for index, one in enumerate(value):
            yield from part_problems(one, entry, f"{place}[{index}]")
    elif not any(_fits(value, kind) for kind in kinds):
        yield f"{place} is {shown(value)}, expected {_words(hint)}"
    elif not _in_range(name := place.rpartition(".")[2], value):
        yield f"{place} is {shown(value)}, expected {_range(name)}"


def _field_problems(value: dict[str, Any], cls: type, place: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for name in sorted(value.keys() - hints.keys() - {"type"}):
        yield f"{place} has an unknown field {shown(name)}"
    for field in dataclasses.fields(cls):
        if field.name in value:
            yield from part_problems(value[field.name], hints[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING:
            yield f"{place} has no {field.name}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON number, text, boolean or null has a type."""
    if kind is int:
        return TOKEN.accepts(value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST_REAL
    return isinstance(kind, type) and isinstance(value, kind)


def _in_range(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in COUNTS:
        return count().accepts(value)
    if name == "eps":
        return 0 <= value <= 1
    if name in NAMES:
        return value in NAMES[name]
    return name not in POSITIVE or value > 0


def _range(name: str) -> str:
    if name in NAMES:
        return f"one of {', '.join(NAMES[name])}"
    return "a number from 0 to 1" if name == "eps" else "a positive number"


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_words(typing.get_args(hint)[0])}"
    return "null" if hint is types.NoneType else hint.__name__
