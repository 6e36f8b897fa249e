"""What a run works with: the model's parameters, split, on their devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import kvjax
from kvjax import processes
from kvjax.checks import check_finite
from kvjax.hf import matching, open_params, read_model
from kvjax.nn import Transformer
from kvjax.sharding import batch_sharding, make_mesh, param_shapes, parse_mesh
from train.finetune.config import TuneConfig
from train.finetune.labels import Flat, split, trainable_paths
from train.finetune.step import TuneState, TuneStep, adamw


@dataclass
class Tuning:
    """What a run works with, loaded once.

    Attributes:
        step: model, optimizer and settings of a step.
        frozen: flat parameters that don't train, in the compute dtype.
        teacher: parameters of the original model, if it is distilled from.
        mesh: None for one device.
    """

    step: TuneStep
    frozen: Flat
    teacher: Any
    mesh: Mesh | None

    def device_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host's rows of a batch, where they are computed with."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def load(config: TuneConfig) -> tuple[Tuning, TuneState]:
    """Model, optimizer and parameters of a run, and its first state.

    Raises:
        ValueError: no such model, one that holds NaN, patterns that match nothing, a mesh that
            does not fit.
    """
    if config.mesh is None and processes.several():
        raise ValueError(
            f"got {jax.process_count()} processes and no --mesh: each would train a model of its "
            "own; give one over all devices, such as --mesh fsdp=-1"
        )
    mesh = None if config.mesh is None else make_mesh(parse_mesh(config.mesh))
    check_rows(config, mesh)
    model = read_model(config.model)
    model = matching(model, open_params(config.model, "float32", mesh))
    trainable, frozen = read_split(config, model, mesh)
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
    """Raises ValueError for rows that the mesh cannot split evenly."""
    rows = config.batch_size // config.accumulate
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ValueError(
            f"got {rows} rows at a time and data · fsdp = {ways}, expected a multiple; give "
            "another --batch-size or --mesh"
        )


def make_step(
    config: TuneConfig, model: Transformer, mesh: Mesh | None, teacher: Transformer | None = None
) -> TuneStep:
    """The step that a run's settings ask for."""
    return TuneStep(
        model=model,
        optimizer=adamw(config.b1, config.b2, config.weight_decay, config.clip),
        dtype=config.dtype,
        accumulate=config.accumulate,
        remat=config.remat,
        place=None if mesh is None else batch_sharding(mesh),
        teacher=teacher,
        distill=config.distill,
    )


def read_split(config: TuneConfig, model: Transformer, mesh: Mesh | None) -> tuple[Flat, Flat]:
    """What trains in fp32 and the rest in the compute dtype; one layer is read at a time.

    Raises:
        ValueError: patterns that match nothing, or weights that hold NaN.
    """
    paths = trainable_paths(model, param_shapes(model), config.train)
    parts = open_params(config.model, "float32", mesh)
    trainable: Flat = {}
    frozen: Flat = {}
    for name in parts:
        part = {name: parts[name]}
        check_finite(part, f"{config.model}: ")
        own, rest = split(part, paths)
        trainable |= own
        frozen |= {path: leaf.astype(config.dtype) for path, leaf in rest.items()}
    return trainable, frozen
