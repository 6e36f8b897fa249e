"""What a number of tokens a head costs, in bytes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kvjax.config import (
    AttentionConfig,
    DecoupledConfig,
    EqualCacheConfig,
    MLAConfig,
    ModelConfig,
)
from pallas_kernels.quantized import is_quantized

SCALE_BYTES = 4


def token_bytes(attention: AttentionConfig, dtype: Any) -> int:
    """Bytes of one token in all heads of a layer, scales of 8-bit entries included."""
    size = jnp.dtype(dtype).itemsize
    scale = SCALE_BYTES if is_quantized(dtype) else 0
    if isinstance(attention, DecoupledConfig):
        return (attention.rank + attention.rope_dim) * size + 2 * scale
    if isinstance(attention, MLAConfig):
        return (attention.kv_lora_rank + attention.qk_rope_head_dim) * size + 2 * scale
    if isinstance(attention, EqualCacheConfig):
        width = attention.key_rank + attention.value_rank
        return attention.latent_heads * (width * size + 2 * scale)
    return 2 * attention.num_kv_heads * (attention.head_dim * size + scale)


def bytes_to_tokens(nbytes: int, config: ModelConfig, dtype: Any) -> int:
    """Mean tokens a head that all layers of one sequence can hold in so many bytes."""
    return nbytes // sum(token_bytes(layer.attention, dtype) for layer in config.layers)
