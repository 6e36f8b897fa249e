"""The parts of every block: products, norms, and the MLPs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.config import MLPConfig, MoEConfig, NormConfig

Params = Mapping[str, Any]
"""The parameters of one part by name; kvjax.nn.params has the names and shapes."""

FEW = 16
"""Pad rows to pairs when there are at most this many: a device of a mesh may have a single one, and
the extra rows cost less than reading the weight."""


def matmul(
    x: Float[Array, "*rows In"], weight: Float[Array, "In ..."], dtype: Any = None
) -> Float[Array, "..."]:
    """x · weight over the last axis of x and the first of the weight, accumulated in fp32.

    Args:
        dtype: dtype of the result; None for the dtype of x.

    Returns:
        [*rows, *out] for a weight of shape [In, *out].
    """
    dtype = x.dtype if dtype is None else dtype
    rows = x.size // x.shape[-1]
    # A few rows may be one per device of an accelerator mesh: pad them as well.
    if rows == 1:
        y = _two_of_each(x, weight)
    elif rows <= FEW:
        y = jax.lax.platform_dependent(x, weight, cpu=_product, default=_two_of_each)
    else:
        y = _product(x, weight)
    return y.astype(dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # With an fp32 result XLA:CPU multiplies bfloat16 directly. For a bfloat16 result it would
    # convert the whole weight to fp32 first, in every decode step.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _two_of_each(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a row of zeros after each row of x; no backend handles a single row well.

    XLA:CPU multiplies a single row outside its matrix library, on one core, with a weight converted
    to fp32. XLA:GPU writes the products to memory in fp32 before adding them up: five times the
    traffic of reading the weight. XLA:TPU uses the vector unit.
    """
    pairs = jnp.pad(x[..., None, :], ((0, 0),) * (x.ndim - 1) + ((0, 1), (0, 0)))
    return jax.lax.index_in_dim(_product(pairs, weight), 0, x.ndim - 1, keepdims=False)


def project(params: Params, name: str, x: Float[Array, "B T X"]) -> jax.Array:
    """x · W, plus the bias if there is one: the parameters `name` [X, ...] and `name`_bias."""
    y = matmul(x, params[name])
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None]


def norm(
    params: Params, name: str, x: Float[Array, "B T D"], config: NormConfig | None
) -> Float[Array, "B T D"]:
    """RMS norm with the weight `name`; x is unchanged if the part has no such norm."""
    return x if config is None or name not in params else rms_norm(x, params[name], config)


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], config: NormConfig
) -> Float[Array, "*batch D"]:
    """x / rms(x) · (offset + weight) over the last axis, in fp32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.eps)
    scale = weight.astype(jnp.float32) + config.offset
    return (x32 * inv_rms * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def mlp(config: MLPConfig, params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """down(act(x · gate) · (x · up)), each product with a bias if the config says so."""
    gate, up = project(params, "gate", x_BTD), project(params, "up", x_BTD)
    return project(params, "down", ACTIVATIONS[config.activation](gate) * up)


def moe(config: MoEConfig, params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each token through its `top_k` experts, weighted by the router's softmax.

    All experts process all tokens, and their outputs are weighted (zero for unchosen experts). The
    result is exact, shapes are static and no token is dropped. The arithmetic is
    num_experts / top_k times that of routed experts.
    """
    logits_BTE = matmul(x_BTD, params["router"])
    weight_BTE = routing_weights(logits_BTE, config).astype(x_BTD.dtype)
    activation = ACTIVATIONS[config.activation]

    # A scan over the experts keeps one expert's activations in memory.
    def add_expert(total, expert):
        gate_DF, up_DF, down_FD, weight_BT = expert
        hidden = activation(matmul(x_BTD, gate_DF)) * matmul(x_BTD, up_DF)
        return total + matmul(hidden, down_FD) * weight_BT[..., None], None

    matrices = params["gate"], params["up"], params["down"]
    experts = (*matrices, jnp.moveaxis(weight_BTE, -1, 0))
    return jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), experts)[0]


def routing_weights(logits_BTE: Float[Array, "B T E"], config: MoEConfig) -> Float[Array, "B T E"]:
    """Softmax over the experts, zero outside each token's `top_k`; fp32."""
    probs = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(probs, config.top_k)
    # Some models weigh the chosen experts to a sum of 1, others keep the softmax as it is.
    if config.normalize:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(chosen, config.num_experts, dtype=jnp.float32)
    return jnp.einsum("btk,btke->bte", top, one_hot)
