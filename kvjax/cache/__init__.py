"""KV caches: pytrees that store new entries and attend over the stored ones."""

from kvjax.cache.attention import NoCache
from kvjax.cache.dense import DenseCache, LatentCache, PrefillCache
from kvjax.cache.layers import (
    AbsorbedCache,
    AttentionSpec,
    Cache,
    ModelCache,
    advance,
    cache_bytes,
    rope_lengths_of,
    with_layer,
    without_last,
)
from kvjax.cache.pool import Pool, PoolLayer
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
    "PrefillCache",
    "ShardedHeads",
    "ShardedSlots",
    "advance",
    "cache_bytes",
    "rope_lengths_of",
    "with_layer",
    "without_last",
]
