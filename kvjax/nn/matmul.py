"""The product of activations with a weight matrix, in the form that every backend runs fast."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW = 16
"""Rows up to which a device of a mesh may have but one; twice as many still cost less than
reading the weight."""


def matmul(
    x: Float[Array, "*rows In"], weight: Float[Array, "In ..."], dtype: Any = None
) -> Float[Array, "..."]:
    """x · weight over x's last and the weight's first axis, accumulated in fp32.

    Args:
        dtype: of the result; default x's.

    Returns:
        [*rows, *out] for a weight of shape [In, *out].
    """
    dtype = x.dtype if dtype is None else dtype
    rows = x.size // x.shape[-1]
    if rows == 1:
        y = _two_of_each(x, weight)
    elif rows <= FEW:
        y = jax.lax.platform_dependent(x, weight, cpu=_product, default=_two_of_each)
    else:
        y = _product(x, weight)
    return y.astype(dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # An fp32 result is also what lets XLA:CPU multiply bfloat16 as it is; for a bfloat16 result
    # it first converts the whole weight to fp32, in every decode step.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _two_of_each(x: jax.Array, weight: jax.Array) -> jax.Array:
    """With a row of zeros after each, since no backend does well with one row a device.

    XLA:CPU multiplies it outside of its matrix library, on one core, with a weight that it has
    converted to fp32. XLA:GPU writes the products to memory, in fp32, before it adds them up: five
    times the traffic of reading the weight. XLA:TPU multiplies on the vector unit.
    """
    pairs = jnp.pad(x[..., None, :], ((0, 0),) * (x.ndim - 1) + ((0, 1), (0, 0)))
    return jax.lax.index_in_dim(_product(pairs, weight), 0, x.ndim - 1, keepdims=False)
