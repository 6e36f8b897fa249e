"""KV caches: pytrees that store new entries and attend over what they hold."""

from kvjax.cache.dense import DenseCache
from kvjax.cache.head_budget import HeadBudgetCache
from kvjax.cache.latent import LatentCache
from kvjax.cache.prompt import PromptCache
from kvjax.cache.protocol import AbsorbedCache, AttentionSpec, Cache, NoCache, cache_bytes
from kvjax.cache.shared_pool import SharedPool, join_layers, with_layer
from kvjax.cache.split import SplitHeads, SplitSlots

__all__ = [
    "AbsorbedCache",
    "AttentionSpec",
    "Cache",
    "DenseCache",
    "HeadBudgetCache",
    "LatentCache",
    "NoCache",
    "PromptCache",
    "SharedPool",
    "SplitHeads",
    "SplitSlots",
    "cache_bytes",
    "join_layers",
    "with_layer",
]
