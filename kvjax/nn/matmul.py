"""The product of activations with a weight matrix, in the form that every backend runs fast."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    if x.size == x.shape[-1]:
        y = jax.lax.platform_dependent(x, weight, cpu=_one_row_on_cpu, default=_product)
    else:
        y = _product(x, weight)
    return y.astype(dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # An fp32 result is also what lets XLA:CPU multiply bfloat16 as it is; for a bfloat16 result
    # it first converts the whole weight to fp32, in every decode step.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _one_row_on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """With a row of zeros below: XLA:CPU runs one row outside of its matrix library, on one core,
    and from a weight that it has converted to fp32."""
    two_rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return _product(two_rows, weight)[0].reshape(*x.shape[:-1], *weight.shape[1:])
