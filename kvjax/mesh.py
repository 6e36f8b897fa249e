"""Meshes: their axes, and how batches and the parts of a cache are sharded over them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
"""Batches are sharded over "data" and "fsdp", parameters over "fsdp" and "tensor"."""

LOGICAL = {
    "batch": ("data", "fsdp"),
    "heads": "tensor",
    "kv": "tensor",
    "slots": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "tensor",
    "embed": "fsdp",
}
"""Mesh axes of every logical axis that is sharded; all others are replicated. "slots" are those of
latents, which have no heads."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or an abstract mesh, for which only shapes are computed."""

ALIASES = {"model": "tensor"}
"""Other names that a mesh may use for these axes."""


def make_mesh(sizes: dict[str, int], devices: Any = None) -> Mesh:
    """A mesh with all of MESH_AXES.

    Args:
        sizes: devices along each axis, 1 for missing axes. One axis may be −1 and gets all
            remaining devices.
        devices: None for all devices.

    Raises:
        ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    unknown = sizes.keys() - set(MESH_AXES)
    if unknown:
        raise ValueError(f"got mesh axes {sorted(unknown)}, expected some of {MESH_AXES}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    # −1 makes the product negative, so its negation counts the devices of the other axes.
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = devices.size // int(-np.prod(shape))
    if min(shape) < 1 or np.prod(shape) != devices.size:
        named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"got a mesh of {named}, expected a product of {devices.size} devices")
    return Mesh(devices.reshape(shape), MESH_AXES)


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes from "data=1,fsdp=4,tensor=2"; see `make_mesh`.

    Raises:
        ValueError: text of another form, an axis given twice, or a size that is neither −1 nor ≥ 1.
    """
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        sizes = {axis.strip(): int(size) for axis, size in pairs}
        if len(sizes) < len(pairs) or any(size < 1 and size != -1 for size in sizes.values()):
            raise ValueError
        return sizes
    except ValueError:
        raise ValueError(
            f"got mesh {text!r}, expected a form like data=1,fsdp=4,tensor=2"
        ) from None


def named_mesh(text: str | None) -> Mesh | None:
    """The mesh that a command line asks for, over this process's devices; None for one device.

    With several processes, each has its mesh and its share of the work.

    Raises:
        ValueError: see `parse_mesh` and `make_mesh`.
    """
    return None if text is None else make_mesh(parse_mesh(text), jax.local_devices())


def automatic(mesh: Any) -> Any:
    """The same devices with automatic axes, for which XLA completes the shardings.

    Since jax 0.9 `jax.make_mesh` makes explicit axes. With explicit axes every product of sharded
    arrays would have to name the sharding of its result.

    Raises:
        ValueError: the argument is not a mesh.
    """
    if not isinstance(mesh, AnyMesh):
        raise ValueError(f"mesh is {mesh!r}, expected a jax.sharding.Mesh: see kvjax.sharding")
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


@contextlib.contextmanager
def automatic_axes() -> Iterator[None]:
    """Context manager and decorator: makes the axes of `jax.set_mesh` automatic inside."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.sharding.use_abstract_mesh(automatic(mesh)):
        yield


def on_automatic_mesh(params: Any) -> Any:
    """The same arrays on a mesh with automatic axes; nothing is copied or moved."""

    def place(leaf: Any) -> Any:
        kind = leaf.aval if isinstance(leaf, Tracer) else leaf
        sharding = getattr(kind, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return leaf
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        return jax.device_put(leaf, NamedSharding(automatic(sharding.mesh), sharding.spec))

    return jax.tree.map(place, params)


def mesh_of(params: Any) -> Mesh | None:
    """The mesh of the parameters, with automatic axes; None if they are on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return automatic(sharding.mesh)
    return None


def own_names(mesh: AnyMesh) -> dict[str, str]:
    """The names of the axes in this mesh, by the names of MESH_AXES."""
    return {ALIASES.get(axis, axis): axis for axis in map(str, mesh.axis_names)}


def batch_axes(mesh: AnyMesh) -> tuple[str, ...]:
    """The axes of this mesh that batches are sharded over."""
    return tuple(axis for axis in LOGICAL["batch"] if axis in mesh.shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(automatic(mesh), PartitionSpec(batch_axes(mesh)))


@dataclass(frozen=True)
class Placement:
    """How a batch of sequences and its caches are sharded over a mesh; hashable.

    Attributes:
        mesh: the mesh of all devices.
        batch: axes that the sequences are sharded over; () if their product does not divide the
            batch, so that every device holds all sequences.
        tensor: axis that heads, or the slots of latents, are sharded over; None for none.
    """

    mesh: AnyMesh
    batch: tuple[str, ...]
    tensor: str | None

    @classmethod
    def create(cls, mesh: AnyMesh, batch_size: int) -> Placement:
        """The placement of a batch of `batch_size` sequences."""
        axes = batch_axes(mesh)
        fits = batch_size % math.prod(mesh.shape[axis] for axis in axes) == 0
        tensor = own_names(mesh).get("tensor")
        sharded = tensor is not None and mesh.shape[tensor] > 1
        return cls(automatic(mesh), axes if fits else (), tensor if sharded else None)

    def of_batch(self) -> Placement:
        """The same batch, with nothing sharded over the tensor axis."""
        return dataclasses.replace(self, tensor=None)

    @property
    def ways(self) -> int:
        """Devices along the tensor axis, and so parts of a cache's heads or slots."""
        return 1 if self.tensor is None else self.mesh.shape[self.tensor]

    @property
    def batch_ways(self) -> int:
        """Number of devices that the sequences are sharded over."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    @property
    def platform(self) -> str:
        """Platform of the devices: "cpu", "tpu", "gpu" or "cuda"."""
        if isinstance(self.mesh, AbstractMesh):
            device = self.mesh.abstract_device
            return jax.default_backend() if device is None else device.platform or "tpu"
        return self.mesh.devices.flat[0].platform

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The spec of an array whose axes are "batch", "tensor" or None."""
        names: dict[str | None, Any] = {"batch": self.batch or None, "tensor": self.tensor}
        return PartitionSpec(*(names.get(axis) for axis in axes))

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrains `x` to the sharding of `spec(*axes)`."""
        sharding = NamedSharding(self.mesh, self.spec(*axes))
        return jax.lax.with_sharding_constraint(x, sharding)

    def device(self) -> Any:
        """Inside `run`: this device's index along the tensor axis."""
        return 0 if self.tensor is None else jax.lax.axis_index(self.tensor)

    def run(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """`function` on each device's parts. Kernels need this: XLA cannot partition them."""
        # check_vma is off because a kernel's result does not say over which axes it varies.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


@functools.partial(jax.jit, static_argnums=1)
def place_rows(arrays: Any, placement: Placement) -> Any:
    """Shards arrays whose first axis is the batch; single numbers are replicated.

    A program is compiled for the shardings of its arguments, so all calls must use the same.
    """
    return jax.tree.map(lambda x: placement.place(x, *["batch"] * min(x.ndim, 1)), arrays)


def put_rows(arrays: Any, device: Any, placement: Placement | None) -> Any:
    """Moves host arrays whose first axis is the batch to the devices.

    Args:
        device: the sharding to use without a mesh.
        placement: placement of the batch on a mesh; None for one device.
    """
    if placement is not None:
        return place_rows(arrays, placement)
    if isinstance(device, NamedSharding):  # a mesh of one device
        device = NamedSharding(device.mesh, PartitionSpec())
    return jax.device_put(arrays, device)
