"""Logical axes of the parameters → axes of a device mesh."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.nn import Transformer

MESH_AXES = ("data", "fsdp", "tensor")
"""Batches are split over "data" and "fsdp", parameters over "fsdp" and "tensor"."""

LOGICAL = {
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "tensor",
    "embed": "fsdp",
}
"""Mesh axis of every logical axis that is split; all others are replicated."""

ALIASES = {"model": "tensor"}
"""Other names under which a mesh may have these axes."""


def make_mesh(sizes: dict[str, int], devices: Any = None) -> Mesh:
    """A mesh with all of MESH_AXES.

    Args:
        sizes: devices along each axis, 1 where it is missing; −1 for one axis: all that remain.
        devices: default all there are.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    unknown = sizes.keys() - set(MESH_AXES)
    if unknown:
        raise ValueError(f"got mesh axes {sorted(unknown)}, expected some of {MESH_AXES}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = devices.size // int(-np.prod(shape))
    if min(shape) < 1 or np.prod(shape) != devices.size:
        named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"got a mesh of {named}, expected a product of {devices.size} devices")
    return Mesh(devices.reshape(shape), MESH_AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes from "data=1,fsdp=4,tensor=2"; see `make_mesh`.

    Raises:
        ValueError: text of another form.
    """
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {axis.strip(): int(size) for axis, size in pairs}
    except ValueError:
        raise ValueError(
            f"got mesh {text!r}, expected a form like data=1,fsdp=4,tensor=2"
        ) from None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in ("data", "fsdp") if a in mesh.shape)))


def param_shapes(model: Transformer) -> Any:
    """The parameters as a pytree of `jax.ShapeDtypeStruct`; nothing is computed."""
    return jax.tree.map(lambda box: box.unbox(), _boxed_shapes(model), is_leaf=_is_box)


def param_shardings(model: Transformer, mesh: Mesh) -> Any:
    """How the parameters lie on a mesh, as a pytree of `NamedSharding`.

    Each mesh axis splits the first logical axis of LOGICAL that it divides; a parameter without
    one is replicated (the K and V projections of 4 heads on 8 devices).

    Raises:
        ValueError: a mesh without any of the axes that split parameters.
    """
    known = {ALIASES.get(axis, axis): axis for axis in map(str, mesh.axis_names)}
    if not known.keys() & set(LOGICAL.values()):
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, expected some of {MESH_AXES} or {tuple(ALIASES)}"
        )

    def sharding(box: nn.LogicallyPartitioned) -> NamedSharding:
        return NamedSharding(mesh, _spec(box.names, box.value.shape, mesh, known))

    return jax.tree.map(sharding, _boxed_shapes(model), is_leaf=_is_box)


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, known: dict[str, str]
) -> PartitionSpec:
    """The split of one parameter; `known` has the mesh's own names of its axes."""
    spec: list[str | None] = []
    for name, length in zip(names, shape, strict=True):
        axis = known.get(LOGICAL.get(name or "", ""))
        free = axis is not None and axis not in spec and length % mesh.shape[axis] == 0
        spec.append(axis if free else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _boxed_shapes(model: Transformer) -> Any:
    # Transformer.init takes the boxes with the axis names off, so its base class is asked.
    def init():
        return nn.Module.init(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

    return jax.eval_shape(init)["params"]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
