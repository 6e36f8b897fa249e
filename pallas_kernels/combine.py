"""Merge of partial softmax results over disjoint sets of keys (split-K)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge(
    a: tuple[Float[Array, "*B H"], Float[Array, "*B"]],
    b: tuple[Float[Array, "*B H"], Float[Array, "*B"]],
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of attention over both sets of keys, from the (out, lse) of each, all fp32.

    A set without live keys has lse −1e30 and counts for nothing.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, top + jnp.log(total)
