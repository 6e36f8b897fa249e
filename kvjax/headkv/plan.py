"""Plans: a policy made concrete for one model and prompt length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from kvjax.cache import AttentionSpec, PromptCache
from kvjax.config import AttentionConfig, EqualCacheConfig, MLAConfig, ModelConfig
from kvjax.headkv.scores import attention_heads
from kvjax.headkv.selection import Caps, Scorer, compress
from kvjax.nn.transformer import init_layer_cache


class Plan(ABC):
    """What prefill does with each layer's cache; hashable, a static argument of jit."""

    @abstractmethod
    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """The empty cache that a layer's prefill fills."""

    @abstractmethod
    def finish(self, layer: int, cache: Any, room: int) -> Any:
        """The cache that decode uses, with room for `room` new tokens."""


@dataclass(frozen=True)
class FullPlan(Plan):
    """One cache for the prompt and the new tokens."""

    config: ModelConfig

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """See `Plan.start`."""
        attention = self.config.layers[layer].attention
        return init_layer_cache(attention, batch, prompt_len + room, dtype)

    def finish(self, layer: int, cache: Any, room: int) -> Any:
        """See `Plan.finish`."""
        return cache


@dataclass(frozen=True)
class CompressedPlan(Plan):
    """Budgets of every KV head, the window not included."""

    config: ModelConfig
    caps: tuple[Caps, ...]
    window: int
    scorer: Scorer

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> PromptCache:
        """See `Plan.start`."""
        attention = self.config.layers[layer].attention
        dense = init_layer_cache(attention, batch, prompt_len, dtype)
        return PromptCache.create(
            dense, self.window, attention_heads(attention)[0], dense.k.shape[-1]
        )

    def finish(self, layer: int, cache: PromptCache, room: int) -> Any:
        """See `Plan.finish`."""
        spec = attention_spec(self.config.layers[layer].attention)
        return compress(cache, spec, self.caps[layer], self.scorer, room)


def no_head_budget(attention: AttentionConfig) -> str | None:
    """Why a layer's heads cannot keep tokens of their own; None where they can."""
    if isinstance(attention, MLAConfig):
        return "multi-head latent attention caches one latent for all heads"
    if isinstance(attention, EqualCacheConfig):
        if attention.rope_site != "before_up":
            return "its keys are rotated after the up-projection, from latents without positions"
        if attention.latent_heads != attention.base.num_kv_heads:
            return f"its {attention.base.num_kv_heads} KV heads share one latent"
    return None


def attention_spec(attention: AttentionConfig) -> AttentionSpec:
    """Scale, sliding window and soft-cap of a layer with head budgets."""
    base = attention.base if isinstance(attention, EqualCacheConfig) else attention
    return AttentionSpec(base.scale, base.window, getattr(base, "softcap", None))


def kv_heads(config: ModelConfig) -> int:
    """K; ValueError where layers differ."""
    heads = {attention_heads(layer.attention)[1] for layer in config.layers}
    if len(heads) != 1:
        raise ValueError(f"layers have {sorted(heads)} KV heads, expected the same in all")
    return heads.pop()
