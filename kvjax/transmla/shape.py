"""What a decoupled conversion would look like, without converting anything."""

from __future__ import annotations

from kvjax.config import AttentionConfig, DecoupledConfig, GQAConfig, RopeConfig, SelectedPairs
from kvjax.nn import Transformer
from kvjax.transmla.latent_layer import folded_config
from kvjax.transmla.layer import gqa_layers


def decoupled_shape(model: Transformer, kv_rank: int, rope_dim: int) -> Transformer:
    """The model that `decoupled` gives with these sizes; frequencies are the first that there are.

    Raises:
        ValueError: a layer that is not GQA, or sizes that its keys and values don't have.
    """
    configs = tuple(_layer(base, kv_rank, rope_dim) for base in gqa_layers(model))
    return Transformer(model.config.with_attention(configs))


def _layer(base: GQAConfig, kv_rank: int, rope_dim: int) -> AttentionConfig:
    turning = 0 if base.rope is None else base.num_kv_heads * base.rope.dim
    width, most = min(rope_dim, turning), 2 * base.num_kv_heads * base.head_dim
    if width % 2 or kv_rank < 1 or kv_rank + width > most:
        raise ValueError(
            f"got kv_rank {kv_rank} and rope_dim {rope_dim}, expected an even rope_dim and at most "
            f"{most} in all: 2·{base.num_kv_heads}·{base.head_dim}"
        )
    rope = None
    if base.rope is not None and width:
        pairs = tuple(index % (base.rope.dim // 2) for index in range(width // 2))
        selected = SelectedPairs(base.rope, pairs)
        rope = RopeConfig(width, base.rope.theta, selected, base.rope.interleaved)
    if base.qk_norm is None:
        return folded_config(base, kv_rank, rope, base.head_dim)
    return DecoupledConfig(base, kv_rank, rope, base.head_dim, out_bias=True)
