"""The parts of a run: its model, the parameters that train and those that don't, its step.

Checkpoints are read a layer at a time, straight to the devices of the mesh.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import kvjax
from kvjax import processes
from kvjax.checks import check_finite
from kvjax.hf import matching, open_params, read_model
from kvjax.nn import Transformer, param_shapes
from kvjax.nn.params import KV_NAMES
from kvjax.sharding import batch_sharding, make_mesh, parse_mesh
from train.finetune.config import TuneConfig, with_dtype
from train.finetune.step import Flat, TuneState, TuneStep, adamw, flatten


@dataclass
class Tuning:
    """Everything that a run loads once.

    Attributes:
        step: model, optimizer and settings of a step.
        frozen: flat parameters that don't train, in the compute dtype.
        teacher: parameters of the original model, for distillation; None without a teacher.
        mesh: None for one device.
    """

    step: TuneStep
    frozen: Flat
    teacher: Any
    mesh: Mesh | None

    def device_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the devices of the mesh, from the rows of each process."""
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def load(config: TuneConfig) -> tuple[Tuning, TuneState]:
    """Loads a run's model, optimizer and parameters, and makes its first state.

    Raises:
        ValueError: no such model, a model that holds NaN, patterns that match nothing, or a mesh
            that does not fit.
    """
    if config.mesh is None and processes.several():
        raise ValueError(
            f"got {jax.process_count()} processes and no --mesh: every one would train "
            "a separate model; give one over all devices, such as --mesh fsdp=-1"
        )
    config = with_dtype(config)
    mesh = None if config.mesh is None else make_mesh(parse_mesh(config.mesh))
    check_rows(config, mesh)
    # A configuration may tie the output matrix to the embedding where the weights have both:
    # `matching` unties it.
    model = read_model(config.model)
    model = matching(model, open_params(config.model, "float32", mesh))
    trainable, frozen = read_parameters(config, model, mesh)
    teacher, teacher_params = None, None
    if config.teacher is not None:
        teacher, teacher_params = kvjax.load(config.teacher, config.dtype, mesh)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"teacher {config.teacher} has {teacher.config.vocab_size} tokens, expected the "
                f"model's {model.config.vocab_size}"
            )
    step = make_step(config, model, mesh, teacher)
    return Tuning(step, frozen, teacher_params, mesh), step.init(trainable)


def check_rows(config: TuneConfig, mesh: Mesh | None) -> None:
    """Raises ValueError where the rows of a micro-batch don't divide evenly over the mesh."""
    rows = config.batch_size // config.accumulate
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(
            f"got {rows} rows at a time and data · fsdp = {shards}, expected a multiple; give "
            "another --batch-size or --mesh"
        )


def make_step(
    config: TuneConfig, model: Transformer, mesh: Mesh | None, teacher: Transformer | None = None
) -> TuneStep:
    """The step with the settings of a run, which name a dtype."""
    assert config.dtype is not None
    return TuneStep(
        model=model,
        optimizer=adamw(config.b1, config.b2, config.weight_decay, config.clip),
        dtype=config.dtype,
        accumulate=config.accumulate,
        remat=config.remat,
        sharding=None if mesh is None else batch_sharding(mesh),
        teacher=teacher,
        distill=config.distill,
    )


def read_parameters(config: TuneConfig, model: Transformer, mesh: Mesh | None) -> tuple[Flat, Flat]:
    """Reads (trainable in fp32, frozen in the compute dtype), one layer at a time.

    Raises:
        ValueError: patterns that match nothing, or weights with NaN.
    """
    paths = trainable_paths(model, param_shapes(model.config), config.train)
    parts = open_params(config.model, "float32", mesh)
    trainable: Flat = {}
    frozen: Flat = {}
    for name in parts:
        # Indexing reads the layer: at most one layer exists in fp32 besides the parameters.
        part = {name: parts[name]}
        check_finite(part, f"{config.model}: ")
        own, rest = partition(part, paths)
        trainable |= own
        frozen |= {path: leaf.astype(config.dtype) for path, leaf in rest.items()}
    return trainable, frozen


GROUPS = ("kv_only", "attention", "all")


def trainable_paths(
    model: Transformer, params: Mapping[str, Any], which: Sequence[str]
) -> set[str]:
    """Paths of the parameters that train.

    Args:
        which: names of GROUPS and patterns of the form "layers_*/attn/q" (`fnmatch`; "*" matches
            "/" too). "kv_only" trains the converted K and V factors, or W_K and W_V of a model with
            GQA, as reported for TransMLA v1 and v2 (arXiv 2502.07864). The authors' released
            script trains the up-projections only: "layers_*/attn/[kv]_up".

    Raises:
        ValueError: a pattern that matches nothing; lists the paths of the first layer.
    """
    paths = set(flatten(params))
    chosen: set[str] = set()
    for pattern in which:
        # A pattern without a match is a mistake even beside patterns that match.
        found = _match(model, paths, pattern)
        if not found:
            near = sorted(path for path in paths if not path.startswith("layers_") or "_0/" in path)
            raise ValueError(
                f"{pattern!r} matches no parameter, expected one of {', '.join(GROUPS)} or a "
                f"pattern for paths like {', '.join(near)}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"got nothing to train, expected some of {', '.join(GROUPS)} or patterns")
    return chosen


def _match(model: Transformer, paths: set[str], pattern: str) -> set[str]:
    if pattern == "all":
        return paths
    if pattern == "attention":
        return {path for path in paths if fnmatch.fnmatchcase(path, "layers_*/attn/*")}
    if pattern == "kv_only":
        named = {
            f"layers_{index}/attn/{name}"
            for index, layer in enumerate(model.config.layers)
            for name in KV_NAMES[type(layer.attention)]
        }
        return paths & named
    return {path for path in paths if fnmatch.fnmatchcase(path, pattern)}


def partition(params: Mapping[str, Any], paths: set[str]) -> tuple[Flat, Flat]:
    """Divides nested parameters into (trainable, frozen), both flat.

    Args:
        paths: of the trainable parameters.
    """
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if path in paths}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in paths}
