"""Logical axes of the parameters → axes of a device mesh."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.nn import Transformer

MODEL_AXIS = "model"
SPLIT = frozenset({"heads", "kv", "mlp", "vocab", "expert"})
"""Logical axes that are split over the mesh's "model" axis; all others are replicated."""


def param_shapes(model: Transformer) -> Any:
    """The parameters as a pytree of `jax.ShapeDtypeStruct`; nothing is computed."""
    return jax.tree.map(lambda box: box.unbox(), _boxed_shapes(model), is_leaf=_is_box)


def param_shardings(model: Transformer, mesh: Mesh) -> Any:
    """How the parameters lie on a mesh, as a pytree of `NamedSharding`.

    The first axis in SPLIT whose size the mesh's "model" axis divides is split over it; a
    parameter without one is replicated (the K and V projections of 4 heads on 8 devices).

    Raises:
        ValueError: a mesh without a "model" axis.
    """
    if MODEL_AXIS not in mesh.axis_names:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, expected one named {MODEL_AXIS!r}")

    def sharding(box: nn.LogicallyPartitioned) -> NamedSharding:
        return NamedSharding(mesh, _spec(box.names, box.value.shape, mesh.shape[MODEL_AXIS]))

    return jax.tree.map(sharding, _boxed_shapes(model), is_leaf=_is_box)


def _spec(names: tuple[str | None, ...], shape: tuple[int, ...], size: int) -> PartitionSpec:
    for axis, (name, length) in enumerate(zip(names, shape, strict=True)):
        if name in SPLIT and length % size == 0:
            return PartitionSpec(*(None,) * axis, MODEL_AXIS)
    return PartitionSpec()


def _boxed_shapes(model: Transformer) -> Any:
    # Transformer.init takes the boxes with the axis names off, so its base class is asked.
    def init():
        return nn.Module.init(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))

    return jax.eval_shape(init)["params"]


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)
