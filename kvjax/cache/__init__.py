"""KV caches: pytrees that store new entries and attend over what they hold."""

from kvjax.cache.dense import DenseCache
from kvjax.cache.latent import LatentCache
from kvjax.cache.layers import ModelCache, advance, rope_lengths_of, with_layer
from kvjax.cache.pool import Pool, PoolLayer
from kvjax.cache.prompt import PromptCache
from kvjax.cache.protocol import AbsorbedCache, AttentionSpec, Cache, NoCache, cache_bytes
from kvjax.cache.sharded import ShardedHeads, ShardedSlots

__all__ = [
    "AbsorbedCache",
    "AttentionSpec",
    "Cache",
    "DenseCache",
    "LatentCache",
    "ModelCache",
    "NoCache",
    "Pool",
    "PoolLayer",
    "PromptCache",
    "ShardedHeads",
    "ShardedSlots",
    "advance",
    "cache_bytes",
    "rope_lengths_of",
    "with_layer",
]
