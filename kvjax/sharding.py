"""How the parameters are sharded over a mesh; kvjax.mesh defines the axes."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.mesh import (
    ALIASES,
    LOGICAL,
    MESH_AXES,
    AnyMesh,
    automatic,
    batch_sharding,
    make_mesh,
    mesh_of,
    named_mesh,
    own_names,
    parse_mesh,
)
from kvjax.nn import Transformer
from kvjax.nn.params import Param, param_table

__all__ = [
    "batch_sharding",
    "make_mesh",
    "mesh_of",
    "named_mesh",
    "param_shardings",
    "parse_mesh",
    "place_params",
]


def place_params(model: Transformer, params: Any, mesh: Mesh | None) -> Any:
    """The parameters, sharded over the mesh; unchanged for None."""
    return params if mesh is None else jax.device_put(params, param_shardings(model, mesh))


def param_shardings(model: Transformer, mesh: AnyMesh) -> Any:
    """The sharding of each parameter, as a pytree of `NamedSharding`.

    Each mesh axis shards the first logical axis of LOGICAL whose length it divides. A parameter
    without such an axis is replicated (the K and V projections of 4 heads on 8 devices).

    Raises:
        ValueError: the mesh has no axis of `MESH_AXES`.
    """
    mesh, known = automatic(mesh), own_names(mesh)
    if not known.keys() & set(MESH_AXES):
        raise ValueError(
            f"the mesh has axes {mesh.axis_names}, expected some of {MESH_AXES} or {tuple(ALIASES)}"
        )

    def sharding(param: Param) -> NamedSharding:
        return NamedSharding(mesh, _spec(param, mesh, known))

    return jax.tree.map(sharding, param_table(model.config))


def _spec(param: Param, mesh: AnyMesh, known: dict[str, str]) -> PartitionSpec:
    """The spec of one parameter; `known` maps the names of MESH_AXES to those of the mesh."""
    spec: list[str | None] = []
    for name, length in zip(param.axes, param.shape, strict=True):
        # A mesh axis can shard one axis of an array only, and must divide its length.
        axis = known.get(str(LOGICAL.get(name or "")))
        free = axis is not None and axis not in spec and length % mesh.shape[axis] == 0
        spec.append(axis if free else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)
