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


def exchange(
    out: Float[Array, "..."], lse: Float[Array, "..."], mesh_axis: str, axis: int
) -> Float[Array, "..."]:
    """Under `jax.shard_map`: results of all heads over each device's keys, to results of each
    device's heads over all keys. One all-to-all.

    Args:
        out, lse: [..., N, ..., H] and [..., N, ...].
        mesh_axis: whose devices hold disjoint sets of keys.
        axis: of the heads.

    Returns:
        out, fp32, of this device's N / devices heads.
    """
    both = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    parts = jax.lax.all_to_all(both[None], mesh_axis, axis + 1, 0, tiled=True)
    out, lse = parts[..., :-1], parts[..., -1]
    weight = jnp.exp(lse - jnp.max(lse, axis=0, keepdims=True))
    return jnp.sum(out * weight[..., None], axis=0) / jnp.sum(weight, axis=0)[..., None]
