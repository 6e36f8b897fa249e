"""How the parameters are sharded over a mesh; kvjax.mesh defines the axes."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config import ModelConfig
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

__all__ = [
    "batch_sharding",
    "logical_axes",
    "make_mesh",
    "mesh_of",
    "named_mesh",
    "param_shapes",
    "param_shardings",
    "parse_mesh",
    "place_params",
]


def param_shapes(model: Transformer) -> Any:
    """The parameters as a pytree of `jax.ShapeDtypeStruct`, without computing anything."""
    return jax.tree.map(lambda box: box.unbox(), _boxed_shapes(model.config), is_leaf=_is_box)


def logical_axes(model: Transformer) -> Any:
    """The names of each parameter's axes, as a tuple; see `kvjax.mesh.LOGICAL`."""
    return jax.tree.map(lambda box: tuple(box.names), _boxed_shapes(model.config), is_leaf=_is_box)


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

    def sharding(box: nn.LogicallyPartitioned) -> NamedSharding:
        return NamedSharding(mesh, _spec(box.names, box.value.shape, mesh, known))

    return jax.tree.map(sharding, _boxed_shapes(model.config), is_leaf=_is_box)


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh, known: dict[str, str]
) -> PartitionSpec:
    """The spec of one parameter; `known` maps the names of MESH_AXES to those of the mesh."""
    spec: list[str | None] = []
    for name, length in zip(names, shape, strict=True):
        # A mesh axis can shard one axis of an array only, and must divide its length.
        axis = known.get(str(LOGICAL.get(name or "")))
        free = axis is not None and axis not in spec and length % mesh.shape[axis] == 0
        spec.append(axis if free else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


@functools.lru_cache(maxsize=32)
def _boxed_shapes(config: ModelConfig) -> Any:
    """The parameters' shapes. Equal layers have equal shapes: one of each kind is traced."""
    layers = config.layers
    each = tuple(dict.fromkeys(layers))
    few = Transformer(dataclasses.replace(config, layers=each))

    # Transformer.init removes the boxes with the axis names; its base class keeps them.
    def init():
        return nn.Module.init(few, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

    shapes = dict(jax.eval_shape(init)["params"])
    own = [shapes.pop(f"layers_{number}") for number in range(len(each))]
    return shapes | {f"layers_{i}": own[each.index(layer)] for i, layer in enumerate(layers)}


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
