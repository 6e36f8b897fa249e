"""Losses over packed documents: cross-entropy and distillation, without the logits of a batch.

A batch has rows of T tokens with several documents each; a document never sees another one. Losses
are sums over tokens, so that micro-batches and processes add up to the batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from kvjax.cache import NoCache
from kvjax.config import ModelConfig
from kvjax.nn import Transformer
from kvjax.nn.transformer import (
    Block,
    apply_block,
    block_kinds,
    embed,
    hidden_logits,
    output_params,
)

PackedBatch = Mapping[str, Any]
"""tokens, targets, positions, segment_ids [B, T] int32, weights [B, T] fp32; see `make_loader`."""

LOGITS = 2**26
"""Largest number of logits that exist on a device at a time: 256 MB in fp32."""


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, or of a part of one.

    Attributes:
        loss: weighted cross-entropy, nats.
        divergence: weighted KL(teacher ‖ student), nats; 0 without a teacher.
        correct: weighted count of targets with the largest logit.
        weight: sum of the weights.
    """

    loss: Float[Array, ""]
    divergence: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


def hidden(
    model: Transformer,
    params: Any,
    batch: PackedBatch,
    remat: bool,
    sharding: NamedSharding | None = None,
) -> Float[Array, "B T D"]:
    """Output of the last layer.

    Args:
        remat: keep only the layers' inputs for the backward pass, and compute the rest again there.
        sharding: of the batch on a mesh; activations are constrained to it.
    """
    x = embed(model.config, params, batch["tokens"])
    # Without the constraint the compiler may gather activations instead of FSDP's weights.
    x = constrain(x, sharding)
    for index, kind in enumerate(block_kinds(model.config)):

        def block(own, x, kind=kind):
            return packed_block(kind.block, sharding, own, kind.pairs, x, batch)

        block = jax.checkpoint(block) if remat else block
        x = block(params[f"layers_{index}"], x)
    return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def packed_block(
    block: Block,
    sharding: NamedSharding | None,
    params: Any,
    pairs: Any,
    x: Float[Array, "B T D"],
    batch: PackedBatch,
) -> Float[Array, "B T D"]:
    """One layer's output; layers of one kind share the program.

    Args:
        block, params, pairs: see `kvjax.nn.transformer.apply_block`.
    """
    positions, cache = batch["positions"], NoCache(batch["segment_ids"])
    lengths = jnp.max(positions, axis=1) + 1
    out = apply_block(block, params, pairs, x, positions, cache, lengths)[0]
    return constrain(out, sharding)


def sum_losses(
    model: Transformer,
    params: Any,
    x: Float[Array, "B T D"],
    batch: PackedBatch,
    teacher: tuple[Transformer, Any, Float[Array, "B T D"]] | None = None,
    sharding: NamedSharding | None = None,
) -> LossSums:
    """Losses from the last layer's output, computed for a slice of the sequence at a time.

    A device holds at most LOGITS logits, in the backward pass too, which computes each slice again.

    Args:
        x: output of `hidden`.
        teacher: the original model, its parameters and its last layer's output.
        sharding: see `hidden`.
    """
    B, T = batch["tokens"].shape
    # Slices are cut along T: the batch axis may be sharded.
    size = max(1, min(T, num_shards(sharding) * LOGITS // (B * model.config.vocab_size)))
    wanted = None if teacher is None else (output_weights(*teacher[:2]), teacher[2])
    return _sliced_sums(size, sharding, output_weights(model, params), x, batch, wanted)


@flax.struct.dataclass
class OutputWeights:
    """The parameters between a model's last layer and its logits."""

    params: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in fp32, from the last layer's output."""
        return hidden_logits(self.config, self.params, x)


def output_weights(model: Transformer, params: Any) -> OutputWeights:
    """Selects the output weights among a model's parameters."""
    return OutputWeights({n: params[n] for n in output_params(model.config)}, model.config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sliced_sums(
    size: int,
    sharding: NamedSharding | None,
    outputs: OutputWeights,
    x: Float[Array, "B T D"],
    batch: PackedBatch,
    teacher: tuple[OutputWeights, Float[Array, "B T D"]] | None,
) -> LossSums:
    """`sum_losses` in slices of `size` tokens of the sequence."""
    B, T = batch["tokens"].shape
    slices = -(-T // size)

    def cut(leaf: jax.Array) -> jax.Array:
        """[B, T, …] → [slices, B, size, …]; padding has weight 0."""
        pad = [(0, 0), (0, slices * size - T)] + [(0, 0)] * (leaf.ndim - 2)
        return jnp.moveaxis(jnp.pad(leaf, pad).reshape(B, slices, size, *leaf.shape[2:]), 1, 0)

    def sums(chunk: Any) -> LossSums:
        x, x_teacher, targets, weights = jax.tree.map(lambda leaf: constrain(leaf, sharding), chunk)
        logits, divergence = outputs.logits(x), jnp.zeros((), jnp.float32)
        if teacher is not None:
            divergence = jnp.sum(kl_divergence(teacher[0].logits(x_teacher), logits) * weights)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        # The loss needs the maximum anyway; an argmax would be a second, slow pass on CPUs.
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        right = (own >= jnp.max(logits, axis=-1)).astype(jnp.float32)
        return LossSums(
            jnp.sum(losses * weights), divergence, jnp.sum(right * weights), weights.sum()
        )

    x_teacher = None if teacher is None else teacher[1]
    chunks = jax.tree.map(cut, (x, x_teacher, batch["targets"], batch["weights"]))
    if slices == 1:
        return sums(jax.tree.map(lambda leaf: leaf[0], chunks))
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.lax.map(jax.checkpoint(sums), chunks))


def kl_divergence(
    teacher: Float[Array, "*rows V"], student: Float[Array, "*rows V"]
) -> Float[Array, "*rows"]:
    """KL(teacher ‖ student) of logits, in nats (Hinton et al., arXiv 1503.02531, temperature 1)."""
    p, q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def constrain(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Constrains `x` to the batch's sharding, that is along its first axis."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def num_shards(sharding: NamedSharding | None) -> int:
    """Number of parts that the batch axis is sharded into."""
    if sharding is None:
        return 1
    axes = sharding.spec[0]
    named = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[axis] for axis in named)
