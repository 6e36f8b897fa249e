"""The real step, compiled for devices that are not here: memory and FLOPs per device."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.capacity.devices import topology_devices
from kvjax.hf import read_shape
from kvjax.nn import Transformer
from kvjax.sharding import batch_sharding, make_mesh, param_shapes, param_shardings, parse_mesh
from train.finetune.config import TuneConfig
from train.finetune.labels import Flat, flatten, trainable_paths
from train.finetune.setup import check_rows, make_step
from train.finetune.step import TuneState, compile_step, state_shardings

BATCH = {
    **dict.fromkeys(("tokens", "targets", "positions", "segments"), "int32"),
    "weights": "float32",
}
"""The arrays of a batch, all [B, T], and their dtypes."""


def dry_run(config: TuneConfig, topology: str | None) -> dict[str, Any]:
    """Compiles the step of a run; no weight exists, no data is read.

    Args:
        config: `model` may also be a config.json. Without a mesh all devices are used for FSDP.
        topology: a TPU topology such as "v5e:8x8" or "v5p:2x2x4", which needs libtpu and no TPU;
            None: the devices that are here.

    Returns:
        Devices, parameters that train and that don't, per-device bytes of arguments (weights,
        optimizer, batch), temporaries and their sum, and FLOPs a step.

    Raises:
        ValueError: no such model, a topology that is not known, a mesh or batch that does not fit.
    """
    model = read_shape(config.model)
    devices = jax.devices() if topology is None else topology_devices(topology)
    sizes = {"fsdp": -1} if config.mesh is None else parse_mesh(config.mesh)
    mesh = make_mesh(sizes, devices)
    check_rows(config, mesh)
    step = make_step(config, model, mesh)
    trainable, frozen = abstract_params(model, config, mesh)
    places = state_shardings(step.optimizer, trainable).opt_state
    opt_state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(step.optimizer.init, trainable),
        places,
    )
    size, rows = (config.batch_size, config.sequence_length), batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(size, jnp.dtype(kind), sharding=rows)
        for name, kind in BATCH.items()
    }
    started = time.monotonic()
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = compile_step(step, TuneState(trainable, opt_state), frozen, batch, rate)
    memory = compiled.call.memory_analysis()
    held = memory.argument_size_in_bytes
    # What is donated is written in place.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "model": config.model,
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "mesh": ", ".join(f"{axis}={count}" for axis, count in mesh.shape.items()),
        "batch": f"{config.batch_size} × {config.sequence_length}",
        "trainable": sum(leaf.size for leaf in trainable.values()),
        "frozen": sum(leaf.size for leaf in frozen.values()),
        "argument_bytes": held,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_per_device": held + new + memory.temp_size_in_bytes,
        "flops_per_device": compiled.flops,
        "compile_seconds": round(time.monotonic() - started, 1),
    }


def abstract_params(model: Transformer, config: TuneConfig, mesh: Any) -> tuple[Flat, Flat]:
    """Shapes with shardings of what trains (fp32) and of what does not (compute dtype)."""
    shapes, places = param_shapes(model), flatten(param_shardings(model, mesh))
    paths = trainable_paths(model, shapes, config.train)
    trainable: Flat = {}
    frozen: Flat = {}
    for path, leaf in flatten(shapes).items():
        target, dtype = (trainable, "float32") if path in paths else (frozen, config.dtype)
        target[path] = jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(jnp.dtype(dtype)), sharding=places[path]
        )
    return trainable, frozen
