"""Cross-entropy over packed documents, and distillation, without logits of the whole batch."""

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
from kvjax.nn.transformer import Block, apply_block, block_kinds, hidden_logits, output_params

Batch = Mapping[str, Any]
"""tokens, targets, positions, segments [B, T] int32 and weights [B, T] fp32 of `train.data`."""

LOGITS = 2**26  # numbers of the logits that exist at a time: 256 MB in fp32


class Sums(NamedTuple):
    """Sums over tokens, so that micro-batches add up to the batch that they are parts of.

    Attributes:
        loss: weighted cross-entropy, nats.
        divergence: weighted KL(teacher ‖ student), nats; 0 without a teacher.
        correct: weighted count of targets that no other token is likelier than.
        weight: sum of the weights.
    """

    loss: Float[Array, ""]
    divergence: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


def hidden(
    model: Transformer,
    params: Any,
    batch: Batch,
    remat: bool,
    place: NamedSharding | None = None,
) -> Float[Array, "B T D"]:
    """Output of the last layer; documents of a row don't see each other.

    Args:
        remat: keep only the inputs of the layers for the backward pass, and compute the rest again.
        place: how the batch is split over devices. Activations are held to it: otherwise the
            compiler may gather them, rather than the weights that FSDP splits.
    """
    x: Any = model.apply({"params": params}, batch["tokens"], method="embed")
    x = keep(x, place)
    for index, kind in enumerate(block_kinds(model.config)):

        def block(own, x, kind=kind):
            return packed_block(kind.block, place, own, kind.pairs, x, batch)

        block = jax.checkpoint(block) if remat else block
        x = block(params[f"layers_{index}"], x)
    return x


@functools.partial(jax.jit, static_argnums=(0, 1))
def packed_block(
    block: Block,
    place: NamedSharding | None,
    params: Any,
    pairs: Any,
    x: Float[Array, "B T D"],
    batch: Batch,
) -> Float[Array, "B T D"]:
    """One layer's output; the program of all layers of a kind, part of the step's in training.

    Args:
        block, params, pairs: see `kvjax.nn.transformer.apply_block`.
    """
    positions, cache = batch["positions"], NoCache(batch["segments"])
    lengths = jnp.max(positions, axis=1) + 1
    return keep(apply_block(block, params, pairs, x, positions, cache, lengths)[0], place)


def token_sums(
    model: Transformer,
    params: Any,
    x: Float[Array, "B T D"],
    batch: Batch,
    teacher: tuple[Transformer, Any, Float[Array, "B T D"]] | None = None,
    place: NamedSharding | None = None,
) -> Sums:
    """Losses from the last layer's output, a slice of the sequence at a time.

    At most LOGITS logits exist on a device, in the backward pass too: each slice's are computed
    again there. Slices go along T, so that a batch that is split over devices stays so.

    Args:
        teacher: the original model, its parameters and its last layer's output.
        place: see `hidden`.
    """
    B, T = batch["tokens"].shape
    size = max(1, min(T, ways(place) * LOGITS // (B * model.config.vocab_size)))
    wanted = None if teacher is None else (output_weights(*teacher[:2]), teacher[2])
    return _sliced_sums(size, place, output_weights(model, params), x, batch, wanted)


@flax.struct.dataclass
class OutputWeights:
    """The parameters behind a model's last layer."""

    params: Any
    config: ModelConfig = flax.struct.field(pytree_node=False)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Of the last layer's output; fp32."""
        return hidden_logits(self.config, self.params, x)


def output_weights(model: Transformer, params: Any) -> OutputWeights:
    """Those of a model's parameters."""
    return OutputWeights({n: params[n] for n in output_params(model.config)}, model.config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sliced_sums(
    size: int,
    place: NamedSharding | None,
    outputs: OutputWeights,
    x: Float[Array, "B T D"],
    batch: Batch,
    teacher: tuple[OutputWeights, Float[Array, "B T D"]] | None,
) -> Sums:
    """`token_sums` in slices of `size` tokens of the sequence."""
    B, T = batch["tokens"].shape
    slices = -(-T // size)

    def cut(leaf: jax.Array) -> jax.Array:
        """[B, T, …] → [slices, B, size, …]; what is added weighs nothing."""
        pad = [(0, 0), (0, slices * size - T)] + [(0, 0)] * (leaf.ndim - 2)
        return jnp.moveaxis(jnp.pad(leaf, pad).reshape(B, slices, size, *leaf.shape[2:]), 1, 0)

    def sums(chunk: Any) -> Sums:
        x, x_teacher, targets, weights = jax.tree.map(lambda leaf: keep(leaf, place), chunk)
        logits, divergence = outputs.logits(x), jnp.zeros((), jnp.float32)
        if teacher is not None:
            divergence = jnp.sum(kl_divergence(teacher[0].logits(x_teacher), logits) * weights)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        # The maximum is there for the loss already; an argmax is a slow pass of its own on CPUs.
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        right = (own >= jnp.max(logits, axis=-1)).astype(jnp.float32)
        return Sums(jnp.sum(losses * weights), divergence, jnp.sum(right * weights), weights.sum())

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


def keep(x: jax.Array, place: NamedSharding | None) -> jax.Array:
    """x, split over devices along its first axis as a batch is."""
    return x if place is None else jax.lax.with_sharding_constraint(x, place)


def ways(place: NamedSharding | None) -> int:
    """Into how many parts the batch is split."""
    if place is None:
        return 1
    axes = place.spec[0]
    named = axes if isinstance(axes, tuple) else (axes,)
    return math.prod(place.mesh.shape[axis] for axis in named)
