"""One way to declare a parameter: name, shape, logical axes, initializer."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Axes = Sequence[str | None]


def declare(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Axes,
    in_axis: int | Sequence[int] = 0,
    init: nn.initializers.Initializer | None = None,
) -> jax.Array:
    """A parameter of `module`.

    Args:
        shape, axes: one logical axis name a dimension; kvjax.sharding maps them to a mesh.
        in_axis: the dimensions that a product with this weight sums over; the variance of the
            default normal initializer is 1 / their size.
        init: another initializer.
    """
    if init is None:
        in_axes = (in_axis,) if isinstance(in_axis, int) else tuple(in_axis)
        fan_in = 1
        for axis in in_axes:
            fan_in *= shape[axis]
        init = nn.initializers.normal(fan_in**-0.5)
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    value: Any = module.param(name, boxed, tuple(shape), jnp.float32)  # unboxed by param
    return value


def zeros(module: nn.Module, name: str, shape: Sequence[int], axes: Axes) -> jax.Array:
    """A parameter that starts at zero: a bias."""
    return declare(module, name, shape, axes, init=nn.initializers.zeros_init())
