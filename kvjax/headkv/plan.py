"""Plans: a policy made concrete for one model and prompt length."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import AttentionSpec, DenseCache, PromptCache
from kvjax.cache.slots import whole_slots
from kvjax.config import (
    AttentionConfig,
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
)
from kvjax.headkv.budgets import used_tokens
from kvjax.headkv.prompt import Prompt, Scorer
from kvjax.headkv.scorers import SinksAndRecent
from kvjax.headkv.scores import attention_heads
from kvjax.headkv.selection import Caps, Keep, compress_heads, compress_tokens, store
from kvjax.headkv.share import PromptShare, prompt_caps
from kvjax.headkv.split import Split
from kvjax.nn.transformer import init_layer_cache


class Plan(ABC):
    """What prefill does with each layer's cache; hashable, a static argument of jit."""

    every: int | None = None
    """New tokens after which the cache is compressed again; None for never."""

    @abstractmethod
    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """The empty cache that a layer's prefill fills."""

    def heads(self, layer: int, cache: Any, room: int) -> tuple[Prompt, Keep] | None:
        """The prompt that a layer's cache has read, and what its heads keep of it; None where
        heads keep no tokens of their own."""
        return None

    def rest(self, layer: int, cache: Any, room: int) -> Any:
        """`finish` where heads keep no tokens of their own."""
        return cache

    def between(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream of prompts, where it lies between layers."""
        return x

    def finish(self, layer: int, cache: Any, room: int) -> Any:
        """The cache that decode uses, with room for `room` new tokens."""
        found = self.heads(layer, cache, room)
        return self.rest(layer, cache, room) if found is None else compress_heads(*found)

    def join(self, caches: list[Any]) -> Any:
        """The caches of all layers as decode takes them."""
        return caches

    def grown(self, layer: int, cache: Any) -> tuple[Prompt, Keep] | None:
        """What a cache holds after `every` new tokens, and what its heads keep; None for all."""
        return None

    def refresh(self, layer: int, cache: Any) -> Any:
        """The cache compressed again after `every` new tokens."""
        found = self.grown(layer, cache)
        return cache if found is None else compress_heads(*found)


@dataclass(frozen=True)
class FullPlan(Plan):
    """All tokens; layers with a sliding window keep no more than the window.

    Attributes:
        dtype: of the entries, as in `Keep`.
    """

    config: ModelConfig
    dtype: str | None = None

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """See `Plan.start`."""
        attention = self.config.layers[layer].attention
        return init_layer_cache(attention, batch, whole_slots(prompt_len + room), dtype)

    def heads(self, layer: int, cache: Any, room: int) -> tuple[Prompt, Keep] | None:
        """See `Plan.heads`; layers with a sliding window keep the last tokens, in rings."""
        attention = self.config.layers[layer].attention
        spec = attention_spec(attention)
        if spec.window is None or no_head_budget(attention) is not None:
            return None
        prompt = Prompt.of_dense(cache, spec, spec.window)
        K, slots = prompt.keys.shape[1:3]
        if spec.window >= slots:
            return None
        return prompt, Keep((0,) * K, SinksAndRecent(), None, self.dtype, (0,) * K, (True,) * K)

    def rest(self, layer: int, cache: Any, room: int) -> Any:
        """See `Plan.rest`."""
        if self.dtype is None:
            return cache
        names = ("k", "v") if isinstance(cache, DenseCache) else ("latent", "k_rope")
        parts = {name: store(getattr(cache, name), self.dtype) for name in names}
        return dataclasses.replace(cache, **parts)


@dataclass(frozen=True)
class CompressedPlan(Plan):
    """Budgets of every KV head.

    Attributes:
        caps: [L][K] budgets, the window not included.
        window: the last tokens of the prompt, which stay in any case.
        queries: the last queries that scorers see.
        scorer, split, dtype: see `Keep`.
        ring: heads whose budget is below the mean of all keep only so many new tokens.
        every: see `Plan.every`.
        share: see `Keep`.
    """

    config: ModelConfig
    caps: tuple[Caps, ...]
    window: int
    queries: int
    scorer: Scorer
    split: Split | None = None
    dtype: str | None = None
    ring: int | None = None
    every: int | None = None
    share: PromptShare | None = None

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> PromptCache:
        """See `Plan.start`."""
        attention = self.config.layers[layer].attention
        watching = getattr(self.scorer, "observer", None)
        observer = None if watching is None else watching(attention)
        return start_prompt(attention, batch, prompt_len, self.queries, dtype, observer)

    def heads(self, layer: int, cache: PromptCache, room: int) -> tuple[Prompt, Keep] | None:
        """See `Plan.heads`."""
        if no_head_budget(self.config.layers[layer].attention) is not None:
            return None
        return self._prompt(layer, cache), self.keep(layer, room)

    def rest(self, layer: int, cache: PromptCache, room: int) -> Any:
        """See `Plan.rest`: all heads of a layer keep the same tokens."""
        return compress_tokens(cache, self._prompt(layer, cache), self.keep_tokens(layer, room))

    def grown(self, layer: int, cache: Any) -> tuple[Prompt, Keep] | None:
        """See `Plan.grown`."""
        assert self.every is not None
        return Prompt.of_pool(cache, *self.compared(layer)), self.keep(layer, self.every)

    def compared(self, layer: int) -> tuple[AttentionSpec, int]:
        """How a layer attends, and the last tokens that stay, with which the others compete."""
        return attention_spec(self.config.layers[layer].attention), self.kept_window(layer)

    def _prompt(self, layer: int, cache: PromptCache) -> Prompt:
        return Prompt.create(cache, *self.compared(layer))

    def keep(self, layer: int, room: int) -> Keep:
        """What stays of a layer whose heads have budgets."""
        caps = self.caps[layer]
        sliding = attention_spec(self.config.layers[layer].attention).window is not None
        room = room if self.every is None else min(room, self.every)
        mean = sum(map(sum, self.caps)) / sum(map(len, self.caps))
        small = [self.ring is not None and cap < mean for cap in caps]
        rooms = tuple(min(room, self.ring or 0) if is_small else room for is_small in small)
        rings = tuple(sliding or is_small for is_small in small)
        remember = self.every is not None
        return Keep(caps, self.scorer, self.split, self.dtype, rooms, rings, remember, self.share)

    def keep_tokens(self, layer: int, room: int) -> Keep:
        """What stays of a layer whose heads share tokens: the mean of its heads' budgets."""
        caps = self.caps[layer]
        cap = round(sum(caps) / len(caps))
        kept = cap + self.kept_window(layer)
        room = whole_slots(kept + room) - kept
        settings = (self.scorer, None, self.dtype, (room,), (False,))
        return Keep((cap,), *settings, share=self.share)

    def kept(self, prompt_len: int) -> Int[np.ndarray, "L K"]:
        """Tokens that each head keeps of a prompt, the window included; of policies with a split
        these are the budgets that the heads of a layer share."""
        lengths = jnp.asarray([prompt_len], jnp.int32)
        rows = [np.asarray(prompt_caps(self.share, caps, lengths)) for caps in self.caps]
        windows = [self.kept_window(layer) for layer in range(len(rows))]
        pairs = zip(rows, windows, strict=True)
        return np.concatenate([used_tokens(caps, window, prompt_len) for caps, window in pairs])

    def kept_window(self, layer: int) -> int:
        """Last tokens that stay in this layer: no more than its sliding window."""
        spec = attention_spec(self.config.layers[layer].attention)
        return min(self.window, spec.window or self.window)


def start_prompt(
    attention: AttentionConfig,
    batch: int,
    prompt_len: int,
    queries: int,
    dtype: Any,
    observer: Any = None,
) -> PromptCache:
    """An empty cache for a prompt that is to be compressed, for any kind of attention."""
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
    return PromptCache.create(base, queries, heads, width, jnp.dtype(dtype), expanded, observer)


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
