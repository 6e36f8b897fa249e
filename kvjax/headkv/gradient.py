"""Task-specific head importance: how much the loss changes when a head's output is scaled.

|∂loss/∂head output · head output| (Michel et al. 2019, arXiv 1905.10650, eq. 3). A gate g = 1 on a
head's rows of the output projection scales its output, so ∂loss/∂g is that product, summed over
the tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.headkv.batches import Batch, positions, step_positions
from kvjax.headkv.scores import query_heads
from kvjax.nn import Transformer
from kvjax.sampling import most_likely


@functools.partial(jax.jit, static_argnames="model")
def loss_gradient(
    model: Transformer, params: Any, batch: Batch
) -> tuple[Float[Array, "B L N"], Int[Array, "B M"]]:
    """|∂loss/∂gate| of every head and example, and the token that the model expects at each step.

    One example at a time, its layers recomputed in the backward pass: the memory beyond the
    parameters is one layer's activations and gated output projections.
    """
    gradient = jax.grad(answer_loss, has_aux=True)
    gates = jnp.ones(query_heads(model.config), jnp.float32)

    def one(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), batch)
        slope, predicted = gradient(gates, model, params, row)
        return jnp.abs(slope), predicted[0]

    return jax.lax.map(one, jnp.arange(batch.tokens.shape[0], dtype=jnp.int32))


def answer_loss(
    gates: Float[Array, "L N"], model: Transformer, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, "B M"]]:
    """Cross-entropy of the answers under gated heads, and the token expected at each step.

    The mean over an answer's tokens, summed over the examples; nats.
    """
    at = positions(batch)

    def apply(params: Any, *args: Any, method: str) -> Any:
        return model.apply({"params": params}, *args, method=method)

    x = apply(params, batch.tokens, method="embed")
    for index in range(model.config.num_layers):

        @jax.checkpoint
        def layer(x: jax.Array, gates_N: jax.Array, index: int = index) -> jax.Array:
            gated = gate_heads(params, index, gates_N)
            return apply(gated, index, x, at, None, batch.lengths, method="layer")[0]

        x = layer(x, gates[index])
    x = jnp.take_along_axis(x, step_positions(batch)[..., None], axis=1)
    logits = apply(params, x, method="unembed")
    log_p = jax.nn.log_softmax(logits, axis=-1)
    loss = -jnp.take_along_axis(log_p, batch.answers[..., None], axis=-1)[..., 0]
    sizes = jnp.sum(batch.steps, axis=1, dtype=jnp.int32).astype(jnp.float32)
    loss = jnp.sum(jnp.where(batch.steps, loss, 0.0), axis=1) / sizes
    return jnp.sum(loss), most_likely(logits)


def gate_heads(params: Any, layer: int, gates: Float[Array, " N"]) -> Any:
    """The parameters with the output of every head of a layer times its gate."""
    name = f"layers_{layer}"
    attention = params[name]["attn"]
    output = attention["o"].astype(jnp.float32) * gates[:, None, None]
    attention = attention | {"o": output.astype(attention["o"].dtype)}
    return params | {name: params[name] | {"attn": attention}}
