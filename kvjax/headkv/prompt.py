"""What token scorers see: one layer's prompt, as it was read or as a compressed cache holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import AttentionSpec, HeadBudgetCache, PromptCache
from kvjax.cache.entries import take_rows
from pallas_kernels import dequantize
from pallas_kernels.reference import NEG_INF, soft_cap


@flax.struct.dataclass
class Prompt:
    """One layer's entries, those of each head in the order of time.

    Z is K where heads hold different tokens, 1 otherwise.

    Attributes:
        keys, values: [B, K, S, ·], rotated; slots at or beyond what is held are zeros.
        queries: [B, w, N, ·] the last w queries, the newest last; where a sequence is shorter
            than w, its first rows are no queries.
        lengths: [B] int32 tokens of the sequence.
        held: [B, Z] int32 slots in use.
        positions: [B, Z, S] int32, −1 for slots that are not in use. A cache that keeps no
            positions gives ranks that end at the newest token.
        seen: state of the scorer's observer, if it has one.
        spec: the layer's scale, soft-cap and sliding window.
        window: the last tokens, which stay in any case.
    """

    keys: Float[Array, "B K S X"]
    values: Float[Array, "B Kv S Y"]
    queries: Float[Array, "B w N X"]
    lengths: Int[Array, " B"]
    held: Int[Array, "B Z"]
    positions: Int[Array, "B Z S"]
    seen: Any
    spec: AttentionSpec = flax.struct.field(pytree_node=False)
    window: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, cache: PromptCache, spec: AttentionSpec, window: int | None = None) -> Prompt:
        """The prompt that a cache has read; `window` is by default the queries it remembers."""
        window = cache.queries.shape[1] if window is None else window
        arrays = (cache.keys, cache.values, cache.queries)
        return cls.of_arrays(*arrays, cache.lengths, cache.seen, spec, window)

    @classmethod
    def of_arrays(cls, keys, values, queries, lengths, seen, spec, window) -> Prompt:
        """All tokens of every head; the slot of a token is its position."""
        slots = jnp.arange(keys.shape[2], dtype=jnp.int32)[None, None]
        held = lengths[:, None]
        positions = jnp.where(slots < held[..., None], slots, -1)
        return cls(keys, values, queries, lengths, held, positions, seen, spec, window)

    @classmethod
    def of_dense(cls, cache: Any, spec: AttentionSpec, window: int) -> Prompt:
        """An uncompressed cache, for scorers that ask for no queries."""
        keys, values = cache.keys_and_values()
        B, K, _, X = keys.shape
        none = jnp.zeros((B, 0, K, X), keys.dtype)
        return cls.of_arrays(keys, values, none, cache.lengths, None, spec, window)

    @classmethod
    def of_pool(cls, cache: HeadBudgetCache, spec: AttentionSpec, window: int) -> Prompt:
        """What a head-budgeted cache with `queries` holds."""
        starts, _ = cache.segments.arrays()
        size = cache.segments.longest(cache.k_pool.shape[1])
        slots = jnp.arange(size, dtype=jnp.int32)[None, None]
        held = cache.live_heads()
        B, K = held.shape
        live = slots < held[..., None]
        rows = jnp.where(live, starts[..., None] + slots, 0).reshape(B, -1)

        def take(entries: Any) -> Any:
            taken = take_rows(entries, rows, live.reshape(B, -1))
            return jax.tree.map(lambda leaf: leaf.reshape(B, K, size, *leaf.shape[2:]), taken)

        dtype = cache.queries.dtype
        keys, values = (dequantize(take(pool), dtype) for pool in (cache.k_pool, cache.v_pool))
        if cache.positions is None:
            positions = slots - held[..., None] + cache.lengths[:, None, None]
        else:
            positions = take(cache.positions)
        positions = jnp.where(live, positions, -1)
        return cls(keys, values, cache.queries, cache.lengths, held, positions, None, spec, window)

    @property
    def candidates(self) -> Bool[Array, "B Z S"]:
        """Slots that a head may keep or drop: before the window, still seen by the next query."""
        end = self.lengths[:, None, None]
        found = (self.positions >= 0) & (self.positions < end - self.window)
        if self.spec.window is not None:
            found &= self.positions > end - self.spec.window
        return found


Scorer = Callable[[Prompt], jax.Array]
"""A prompt to scores [B, K, S] fp32, higher for tokens to keep; non-candidates don't matter.

A scorer that must see more queries than the last w also has a method `observer(attention)`, which
gives a `kvjax.cache.Observer` for a layer; its state comes as `prompt.seen`.
"""


def query_attention(prompt: Prompt) -> Float[Array, "B N w S"]:
    """Attention of each of the last queries over all keys, fp32; zeros for rows without a query.

    The softmax is over all keys that are held, causal inside the window, with the layer's scale,
    soft-cap and sliding window.
    """
    w = prompt.queries.shape[1]
    at = prompt.lengths[:, None] - w + jnp.arange(w, dtype=jnp.int32)[None]
    return attention_weights(prompt.queries, at, prompt.keys, prompt.positions, prompt.spec)


def attention_weights(
    q_BTNX: Float[Array, "B T N X"],
    q_positions: Int[Array, "B T"],
    keys: Float[Array, "B K S X"],
    k_positions: Int[Array, "B Z S"],
    spec: AttentionSpec,
) -> Float[Array, "B N T S"]:
    """Softmax weights of every query over the keys it sees; zeros for padding (position < 0)."""
    B, T, N, X = q_BTNX.shape
    K, S = keys.shape[1:3]
    q = q_BTNX.reshape(B, T, K, N // K, X)
    logits = jnp.einsum("btkgx,bksx->bkgts", q, keys, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * spec.scale, spec.softcap)
    at = q_positions[:, None, :, None]
    seen = (at >= 0) & (k_positions >= 0)[:, :, None] & (k_positions[:, :, None] <= at)
    if spec.window is not None:
        seen &= at - k_positions[:, :, None] < spec.window
    seen = seen[:, :, None]
    attention = jax.nn.softmax(jnp.where(seen, logits, NEG_INF), axis=-1)
    return jnp.where(seen, attention, 0.0).reshape(B, N, T, S)


def by_kv_head(weights_BNS: Float[Array, "B N S"], num_kv_heads: int) -> Float[Array, "B K S"]:
    """Mean over the query heads of each group."""
    B, N, S = weights_BNS.shape
    return jnp.mean(weights_BNS.reshape(B, num_kv_heads, N // num_kv_heads, S), axis=2)
