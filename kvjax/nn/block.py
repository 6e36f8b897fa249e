"""One transformer block, and the compiled program that every layer of its kind shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)
from kvjax.nn.decoupled import DecoupledAttention
from kvjax.nn.equal_cache import EqualCacheAttention
from kvjax.nn.gqa import GQA, norm_weight
from kvjax.nn.mla import MLA
from kvjax.nn.mlp import MLP, MoE
from kvjax.nn.norm import rms_norm
from kvjax.nn.rope import with_pairs, without_pairs

ATTENTION = {
    GQAConfig: GQA,
    EqualCacheConfig: EqualCacheAttention,
    MLAConfig: MLA,
    DecoupledConfig: DecoupledAttention,
}
MLPS = {MLPConfig: MLP, MoEConfig: MoE}


class Block(nn.Module):
    """x + attention, then x + MLP, with the norms that the model has."""

    layer: LayerConfig
    norm: NormConfig
    pre_norm: bool = True
    post_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: Any,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; see `Transformer.__call__`."""
        attention = ATTENTION[type(self.layer.attention)](self.layer.attention, name="attn")
        mlp = MLPS[type(self.layer.mlp)](self.layer.mlp, name="mlp")
        y, cache = attention(
            self._norm("attn_pre_norm", x_BTD, self.pre_norm), positions_BT, cache, lengths_B
        )
        x_BTD = x_BTD + self._norm("attn_post_norm", y, self.post_norm)
        y = mlp(self._norm("mlp_pre_norm", x_BTD, self.pre_norm))
        return x_BTD + self._norm("mlp_post_norm", y, self.post_norm), cache

    def _norm(self, name: str, x: jax.Array, present: bool) -> jax.Array:
        if not present:
            return x
        return rms_norm(x, norm_weight(self, name, x.shape[-1], self.norm), self.norm)


def block_of(config: ModelConfig, layer: LayerConfig, **linen: Any) -> Block:
    """The block of one of the model's layers; `linen` has what every Linen module takes."""
    return Block(layer, config.norm, config.pre_norm, config.post_norm, **linen)


class BlockKind(NamedTuple):
    """A block without what differs from layer to layer and changes no shape.

    Layers of one kind share one compiled program; what differs is its argument.

    Attributes:
        block: hashable.
        pairs: [R/2] int32, which frequencies a converted layer's rotary key has (`SelectedPairs`);
            None for other layers.
    """

    block: Block
    pairs: Int[np.ndarray, " half"] | None


@functools.lru_cache
def block_kinds(config: ModelConfig) -> tuple[BlockKind, ...]:
    """The kind of each layer."""
    return tuple(block_kind(config, layer) for layer in config.layers)


def block_kind(config: ModelConfig, layer: LayerConfig) -> BlockKind:
    """The kind of a layer with the model's norms; the layer need not be one of the model's.

    Blocks have no parent: a Transformer at work would adopt them.
    """
    rope, pairs = without_pairs(layer.attention.rope)
    if pairs is not None:
        attention: Any = dataclasses.replace(layer.attention, rope=rope)  # type: ignore
        layer = dataclasses.replace(layer, attention=attention)
    return BlockKind(block_of(config, layer, parent=None), pairs)


def whole_block(block: Block, pairs: Int[Array, " half"] | None) -> Block:
    """The block of a kind with the pairs of one layer: it is no longer hashable."""
    if pairs is None:
        return block
    rope = with_pairs(block.layer.attention.rope, pairs)
    attention: Any = dataclasses.replace(block.layer.attention, rope=rope)  # type: ignore
    return block.clone(parent=None, layer=dataclasses.replace(block.layer, attention=attention))


def apply_block(
    block: Block,
    params: Any,
    pairs: Int[Array, " half"] | None,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: Any,
    rope_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer of a `BlockKind`."""
    block = whole_block(block, pairs)
    result: Any = block.apply({"params": params}, x, positions, cache, rope_lengths)
    return result


BlockProgram = Callable[..., tuple[jax.Array, Any]]
"""`apply_block` of one kind, compiled: (params, pairs, x, positions, cache, rope lengths)."""


@functools.cache
def block_program(block: Block, donate: bool = False) -> BlockProgram:
    """The compiled block that all layers of a kind share.

    Args:
        donate: the cache that is passed is written in place and must not be used again.
    """
    return jax.jit(functools.partial(apply_block, block), donate_argnums=(4,) if donate else ())


def run_layer(
    kind: BlockKind,
    params: Any,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: Any,
    rope_lengths: Int[Array, " B"],
    donate: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer: a call of its kind's program, which under `jax.jit` becomes part of another."""
    block: Any = kind.block  # hashable, which pyright does not see of Linen modules
    return block_program(block, donate)(params, kind.pairs, x, positions, cache, rope_lengths)
