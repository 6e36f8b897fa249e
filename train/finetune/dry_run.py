"""Compiles the step of a run for devices that need not be present: memory and FLOPs per device."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.capacity.devices import topology_devices
from kvjax.hf import read_shape
from kvjax.nn import Transformer, param_shapes
from kvjax.sharding import batch_sharding, make_mesh, param_shardings, parse_mesh
from train.finetune.config import TuneConfig, with_dtype
from train.finetune.setup import check_rows, make_step, trainable_paths
from train.finetune.step import Flat, TuneState, compile_step, flatten, state_shardings

BATCH = {
    **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), "int32"),
    "weights": "float32",
}
"""Dtypes of the arrays of a batch, all [B, T]."""


def dry_run(config: TuneConfig, topology: str | None) -> dict[str, Any]:
    """Compiles the step of a run without making weights or reading data.

    Args:
        config: `model` may also be a config.json. Without a mesh all devices are used for FSDP.
        topology: a TPU topology such as "v5e:8x8" or "v5p:2x2x4", which needs libtpu but no TPU;
            None: the devices of this machine.

    Returns:
        Devices, numbers of trainable and frozen parameters, bytes per device (arguments, which are
        weights, optimizer and batch; temporaries; their sum), and FLOPs per device and step.

    Raises:
        ValueError: no such model, an unknown topology, or a mesh or batch that does not fit.
    """
    model = read_shape(config.model)
    devices = jax.devices() if topology is None else topology_devices(topology)
    config = with_dtype(config, devices[0].platform)
    sizes = {"fsdp": -1} if config.mesh is None else parse_mesh(config.mesh)
    mesh = make_mesh(sizes, devices)
    check_rows(config, mesh)
    step = make_step(config, model, mesh)
    # Shapes with shardings stand for parameters, optimizer and batch.
    trainable, frozen = abstract_params(model, config, mesh)
    shardings = state_shardings(step.optimizer, trainable).opt_state
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(step.optimizer.init, trainable),
        shardings,
    )
    size, rows = (config.batch_size, config.sequence_length), batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(size, jnp.dtype(kind), sharding=rows)
        for name, kind in BATCH.items()
    }
    # Compile, and read the compiler's counts.
    started = time.monotonic()
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = compile_step(step, TuneState(trainable, opt_state), frozen, batch, rate)
    memory = compiled.call.memory_analysis()
    held = memory.argument_size_in_bytes
    # Outputs that alias donated arguments need no memory.
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
    """(trainable in fp32, frozen in the compute dtype) as shapes with shardings."""
    shapes, shardings = param_shapes(model.config), flatten(param_shardings(model, mesh))
    paths = trainable_paths(model, shapes, config.train)
    trainable: Flat = {}
    frozen: Flat = {}
    for path, leaf in flatten(shapes).items():
        target, dtype = (trainable, "float32") if path in paths else (frozen, config.dtype)
        target[path] = jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(jnp.dtype(dtype)), sharding=shardings[path]
        )
    return trainable, frozen
