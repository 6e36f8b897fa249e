"""One layer of the model that is converted, taken apart: what calibration and refits look at."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import NoCache
from kvjax.cache.attention import visible
from kvjax.config import GQAConfig, LayerConfig, ModelConfig
from kvjax.nn.attention import qk_norm
from kvjax.nn.layers import matmul, rms_norm
from kvjax.nn.rope import rope
from kvjax.nn.transformer import ATTENTION, Block, Transformer, block_kind, run_layer, whole_block
from pallas_kernels.reference import NEG_INF, soft_cap

Params = dict[str, Any]


def gqa_layers(model: Transformer) -> list[GQAConfig]:
    """The attention of all layers.

    Raises:
        ValueError: names the layers that are not GQA.
    """
    configs = [layer.attention for layer in model.config.layers]
    others = [f"{i}: {type(c).__name__}" for i, c in enumerate(configs) if type(c) is not GQAConfig]
    if others:
        raise ValueError(f"TransMLA converts GQA layers only, got {', '.join(others)}")
    return [c for c in configs if isinstance(c, GQAConfig)]


class Heads(NamedTuple):
    """Queries, keys and values of GQA, normed and not yet rotated.

    Attributes:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array

    @classmethod
    def of(cls, block: Block, params: Params, x: jax.Array) -> Heads:
        """Of a block's parameters and its input [B, T, D], before the norm."""
        base, attn, x = gqa_of(block), params["attn"], attention_input(block, params, x)

        def project(name: str) -> jax.Array:
            y = matmul(x, attn[name])
            y = y + attn[f"{name}_bias"][None, None] if base.qkv_bias else y
            return qk_norm(y, attn.get(f"{name}_norm"), base.norm)

        return cls(project("q"), project("k"), project("v"))

    def rotated(self, base: GQAConfig) -> Heads:
        """Queries and keys with RoPE."""
        at, lengths = _positions(self.q)
        turn = functools.partial(rope, positions_BT=at, lengths_B=lengths, config=base.rope)
        return self._replace(q=turn(self.q), k=turn(self.k))


def gqa_of(block: Block) -> GQAConfig:
    """The attention of a block that is to be converted."""
    assert isinstance(block.layer.attention, GQAConfig)
    return block.layer.attention


def attention_input(block: Block, params: Params, x: jax.Array) -> jax.Array:
    """The block's input after the norm that stands before its attention, if one does."""
    return rms_norm(x, params["attn_pre_norm"], block.norm) if block.pre_norm else x


def _positions(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T] positions and [B] lengths of sequences without padding."""
    B, T = x.shape[:2]
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return at, jnp.full((B,), T, jnp.int32)


def scores(
    q_BQNH: Float[Array, "B Q N H"], k_BSKH: Float[Array, "B S K H"], scale: float
) -> Float[Array, "B N Q S"]:
    """Scaled products of rotated queries and keys, before any soft-cap; fp32."""
    B, Q, N, H = q_BQNH.shape
    q = q_BQNH.reshape(B, Q, k_BSKH.shape[2], -1, H)
    s = jnp.einsum("bqkgh,bskh->bkgqs", q, k_BSKH, preferred_element_type=jnp.float32)
    return s.reshape(B, N, Q, -1) * scale


def attention_weights(
    s_BNQS: Float[Array, "B N Q S"], at: jax.Array, base: GQAConfig
) -> Float[Array, "B N Q S"]:
    """Softmax of the scores of queries at the positions `at` [Q] over the keys they see; fp32."""
    keys = jnp.arange(s_BNQS.shape[3], dtype=jnp.int32)
    mask = visible(at[None], keys[None], base.window)[:, None]
    return jax.nn.softmax(jnp.where(mask, soft_cap(s_BNQS, base.softcap), NEG_INF), axis=-1)


def run_block(
    config: ModelConfig, layer: LayerConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The output of a layer for sequences without padding, by the program of its kind."""
    at, lengths = _positions(x)
    return run_layer(block_kind(config, layer), params, x, at, NoCache(), lengths)[0]


@functools.partial(jax.jit, static_argnums=0)
def attention_output(
    block: Block,
    params: Params,
    pairs: Int[Array, " half"] | None,
    x: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """The output of a block's attention, before any norm and the residual sum.

    Args:
        block, pairs: of a `BlockKind`.
    """
    config = whole_block(block, pairs).layer.attention
    at, lengths = _positions(x)
    attention = ATTENTION[type(config)](config, parent=None)
    y = attention_input(block, params, x)
    return attention.apply({"params": params["attn"]}, y, at, NoCache(), lengths)[0]
