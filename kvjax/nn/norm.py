"""RMS norm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.config import NormConfig


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], config: NormConfig
) -> Float[Array, "*batch D"]:
    """x / rms(x) · (offset + weight) over the last axis, in fp32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.eps)
    scale = weight.astype(jnp.float32) + config.offset
    return (x32 * inv_rms * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
