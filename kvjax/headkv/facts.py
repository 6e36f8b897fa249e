"""What compression must know of a layer's attention, whatever its kind."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kvjax.cache import AttentionSpec, DenseCache, PrefillCache
from kvjax.cache.sharded import place, spread
from kvjax.config import (
    AttentionConfig,
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
)
from kvjax.headkv.scores import attention_heads
from kvjax.mesh import AnyMesh, Layout
from kvjax.nn.transformer import init_layer_cache


def start_prompt(
    attention: AttentionConfig,
    batch: int,
    prompt_len: int,
    queries: int,
    dtype: Any,
    observers: tuple[Any, ...] = (),
    mesh: AnyMesh | None = None,
) -> PrefillCache:
    """An empty cache for a prompt that is to be compressed, for any kind of attention.

    Keys that are rebuilt from latents at every step (`equal_cache` with RoPE after the
    up-projection) have neither heads nor slots that a mesh could split: every device along the
    tensor axis holds them all.

    Raises:
        ValueError: the mesh's tensor axis fits neither the KV heads nor their multiples.
        NotImplementedError: a scorer that watches the prompt, on more devices than KV heads.
    """
    base = init_layer_cache(attention, batch, prompt_len, dtype)
    heads = attention_heads(attention)[0]
    expanded = None
    if isinstance(attention, MLAConfig | DecoupledConfig):
        width = base.latent.shape[-1] + base.k_rope.shape[-1]
    elif isinstance(attention, EqualCacheConfig) and attention.rope_site == "after_up":
        width = attention.base.head_dim
        expanded = DenseCache.create(batch, heads, prompt_len, width, 0, dtype)
    else:
        width = base.k.shape[-1]
    cache = PrefillCache.create(base, queries, heads, width, jnp.dtype(dtype), expanded, observers)
    if mesh is None:
        return cache
    layout = Layout.create(mesh, batch)
    if not rebuilds_keys(attention):
        return spread(cache, layout, attention_spec(attention).window)
    return dataclasses.replace(
        cache, base=place(base, layout.of_batch()), expanded=place(expanded, layout.of_batch())
    )


def spread_layer(attention: AttentionConfig, cache: Any, layout: Layout) -> Any:
    """One layer's cache, with or without entries, over a mesh."""
    if rebuilds_keys(attention):
        return place(cache, layout.of_batch())
    return spread(cache, layout, attention_spec(attention).window)


def rebuilds_keys(attention: AttentionConfig) -> bool:
    """Whether keys are rebuilt from latents at every step."""
    return isinstance(attention, EqualCacheConfig) and attention.rope_site == "after_up"


def no_head_budget(attention: AttentionConfig) -> str | None:
    """Why a layer's heads cannot keep tokens of their own; None where they can."""
    if isinstance(attention, MLAConfig | DecoupledConfig):
        return "multi-head latent attention caches one latent for all heads"
    if isinstance(attention, EqualCacheConfig):
        if attention.rope_site != "before_up":
            return "its keys are rotated after the up-projection, from latents without positions"
        if attention.latent_heads != attention.base.num_kv_heads:
            return f"its {attention.base.num_kv_heads} KV heads share one latent"
    return None


def attention_spec(attention: AttentionConfig) -> AttentionSpec:
    """Scale, sliding window and soft-cap of a layer."""
    base = unconverted(attention)
    return AttentionSpec(base.scale, base.window, base.softcap)


def unconverted(attention: AttentionConfig) -> GQAConfig | MLAConfig:
    """The attention that a conversion kept inside, or the attention itself."""
    if isinstance(attention, EqualCacheConfig | DecoupledConfig):
        return attention.base
    return attention


def sliding_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """[L] the sliding window of each layer, None without one."""
    return tuple(attention_spec(layer.attention).window for layer in config.layers)


def kv_heads(config: ModelConfig) -> int:
    """Heads that budgets are made for: K of the attention, before its conversion too.

    Raises:
        ValueError: layers differ.
    """
    heads = {budget_heads(layer.attention) for layer in config.layers}
    if len(heads) != 1:
        raise ValueError(f"layers have {sorted(heads)} KV heads, expected the same in all")
    return heads.pop()


def budget_heads(attention: AttentionConfig) -> int:
    """K; 1 for a latent that was not made from heads."""
    base = unconverted(attention)
    return base.num_kv_heads if isinstance(base, GQAConfig) else 1


def entry_widths(attention: AttentionConfig) -> tuple[int, int]:
    """Numbers of a head's key and value, as they are cached."""
    if isinstance(attention, EqualCacheConfig):
        return attention.key_rank, attention.value_rank
    assert isinstance(attention, GQAConfig)
    return attention.head_dim, attention.head_dim
