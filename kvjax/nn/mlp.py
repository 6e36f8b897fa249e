"""Gated MLP and mixture of experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax.config import MLPConfig, MoEConfig
from kvjax.nn.matmul import matmul
from kvjax.nn.params import declare, zeros

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nn.Module):
    """down(act(x · gate) · (x · up)), each product with a bias where the config says so."""

    config: MLPConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, D = self.config, x_BTD.shape[-1]
        gate = linear(self, "gate", x_BTD, (D, c.width), ("embed", "mlp"), c.bias)
        up = linear(self, "up", x_BTD, (D, c.width), ("embed", "mlp"), c.bias)
        hidden = ACTIVATIONS[c.activation](gate) * up
        return linear(self, "down", hidden, (c.width, D), ("mlp", "embed"), c.bias)


def linear(
    module: nn.Module,
    name: str,
    x: Float[Array, "B T X"],
    shape: tuple[int, int],
    axes: tuple[str, str],
    bias: bool,
) -> Float[Array, "B T Y"]:
    """x · W; parameters `name` [X, Y] and `name`_bias [Y]."""
    y = matmul(x, declare(module, name, shape, axes))
    return y + zeros(module, f"{name}_bias", shape[1:], axes[1:])[None, None] if bias else y


class MoE(nn.Module):
    """Each token through its `top_k` experts, weighted by the router's softmax.

    Experts are computed for all tokens and masked by their weight: exact, with static shapes, and
    free of token dropping; it costs num_experts / top_k times the arithmetic of a routed one.
    """

    config: MoEConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, D = self.config, x_BTD.shape[-1]
        router = declare(self, "router", (D, c.num_experts), ("embed", "expert"))
        shape, axes = (c.num_experts, D, c.width), ("expert", "embed", "mlp")
        gate = declare(self, "gate", shape, axes, in_axis=1)
        up = declare(self, "up", shape, axes, in_axis=1)
        down = declare(
            self, "down", (c.num_experts, c.width, D), ("expert", "mlp", "embed"), in_axis=1
        )
        weight_BTE = routing_weights(matmul(x_BTD, router), c).astype(x_BTD.dtype)

        def add_expert(total, expert):
            gate_DF, up_DF, down_FD, weight_BT = expert
            hidden = ACTIVATIONS[c.activation](matmul(x_BTD, gate_DF)) * matmul(x_BTD, up_DF)
            return total + matmul(hidden, down_FD) * weight_BT[..., None], None

        experts = (gate, up, down, jnp.moveaxis(weight_BTE, -1, 0))
        return jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), experts)[0]


def routing_weights(logits_BTE: Float[Array, "B T E"], config: MoEConfig) -> Float[Array, "B T E"]:
    """Softmax over the experts, zero outside each token's `top_k`; fp32."""
    probs = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(probs, config.top_k)
    if config.normalize:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(chosen, config.num_experts, dtype=jnp.float32)
    return jnp.einsum("btk,btke->bte", top, one_hot)
