"""Which prompt tokens a head keeps, and packing them into the head-budgeted cache.

A scorer gives every token of every head a number; each head keeps the `cap` best besides the
window, the last w tokens. Ties go to the later position; what is kept stays in the order of time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import AttentionSpec, PromptCache
from kvjax.cache.head_budget import HeadBudgetCache, pool_alignment

Caps = tuple[int, ...]
"""Budget of each KV head of a layer, the window not included."""


@flax.struct.dataclass
class Prompt:
    """One layer's prompt as a scorer sees it.

    Attributes:
        keys, values: [B, K, S, ·], rotated; rows at or beyond a sequence's length are zeros.
        queries: [B, w, N, ·] the last w queries, the newest last; where a sequence is shorter
            than w, its first rows are no queries.
        lengths: [B] int32 tokens.
        candidates: [B, S] bool, what a head may keep or drop: tokens before the window that the
            next query still sees.
        spec: the layer's scale, soft-cap and sliding window.
    """

    keys: Float[Array, "B K S X"]
    values: Float[Array, "B K S Y"]
    queries: Float[Array, "B w N X"]
    lengths: Int[Array, " B"]
    candidates: Bool[Array, "B S"]
    spec: AttentionSpec = flax.struct.field(pytree_node=False)

    @classmethod
    def create(cls, cache: PromptCache, spec: AttentionSpec) -> Prompt:
        """The prompt that a cache has read."""
        window = cache.queries.shape[1]
        slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None]
        candidates = slots < cache.lengths[:, None] - window
        if spec.window is not None:
            candidates &= slots > cache.lengths[:, None] - spec.window
        dense = cache.dense
        return cls(dense.k, dense.v, cache.queries, cache.lengths, candidates, spec)


Scorer = Callable[[Prompt], jax.Array]
"""A prompt to scores [B, K, S] fp32, higher for tokens to keep; non-candidates don't matter."""


def compress(
    cache: PromptCache, spec: AttentionSpec, caps: Caps, scorer: Scorer, room: int
) -> HeadBudgetCache:
    """The prompt's cache cut down to each head's budget, with room for `room` new tokens a head.

    A sequence of n tokens keeps min(cap, n − w) + w entries in a head, n if it is shorter than w.
    """
    prompt = Prompt.create(cache, spec)
    with jax.named_scope("select"):
        kept, counts = select(scorer(prompt), prompt.candidates, caps)
    with jax.named_scope("pack"):
        return pack(prompt, kept, counts, caps, room)


def select(
    scores_BKS: Float[Array, "B K S"], candidates_BS: Bool[Array, "B S"], caps: Caps
) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The best candidates of every head.

    Returns:
        kept: positions in ascending order, S beyond the count; C is the largest budget.
        counts: how many each head keeps, min(cap, candidates).
    """
    S = scores_BKS.shape[2]
    most = min(max(*caps, 0), S)
    scores = jnp.where(candidates_BS[:, None], scores_BKS, -jnp.inf)
    # top_k prefers the lower index; on the reversed row that is the later position.
    _, reversed_positions = jax.lax.top_k(scores[:, :, ::-1], most)
    available = jnp.sum(candidates_BS, axis=1, dtype=jnp.int32)
    counts = jnp.minimum(jnp.asarray(caps, jnp.int32)[None], available[:, None])
    rank = jnp.arange(most, dtype=jnp.int32)[None, None]
    kept = jnp.where(rank < counts[:, :, None], S - 1 - reversed_positions, S)
    return jnp.sort(kept, axis=-1), counts


def pack(
    prompt: Prompt,
    kept_BKC: Int[Array, "B K C"],
    counts_BK: Int[Array, "B K"],
    caps: Caps,
    room: int,
) -> HeadBudgetCache:
    """Gathers the kept tokens and the window of every head into one flat pool."""
    B, K, S, X = prompt.keys.shape
    Y, w = prompt.values.shape[-1], prompt.queries.shape[1]
    dtype = prompt.keys.dtype
    cache = HeadBudgetCache.create(
        B,
        [cap + w + room for cap in caps],
        X,
        Y,
        dtype,
        keep_positions=prompt.spec.window is not None,
        align=pool_alignment(dtype),
    )
    head_P, rank_P = pool_rows(cache.starts, cache.capacities, cache.k_pool.shape[1])
    source_BP = source_positions(prompt.lengths, kept_BKC, counts_BK, head_P, rank_P, w)
    live = source_BP >= 0
    flat_BP = jnp.asarray(head_P)[None] * S + jnp.maximum(source_BP, 0)

    def gather(entries: jax.Array) -> jax.Array:
        rows = entries.reshape(B, K * S, -1)
        taken = jnp.take_along_axis(rows, flat_BP[..., None], axis=1)
        return jnp.where(live[..., None], taken, jnp.zeros((), dtype))

    return dataclasses.replace(
        cache,
        k_pool=gather(prompt.keys),
        v_pool=gather(prompt.values),
        head_lengths=counts_BK + jnp.minimum(prompt.lengths, w)[:, None],
        lengths=prompt.lengths,
        positions=None if cache.positions is None else source_BP,
    )


def pool_rows(starts: Caps, capacities: Caps, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each pool row: its head and its rank in the head's segment, a huge one in the gaps."""
    head, rank = np.zeros(rows, np.int32), np.full(rows, np.iinfo(np.int32).max, np.int32)
    for index, (start, capacity) in enumerate(zip(starts, capacities, strict=True)):
        head[start : start + capacity] = index
        rank[start : start + capacity] = np.arange(capacity)
    return head, rank


def source_positions(
    lengths_B: Int[Array, " B"],
    kept_BKC: Int[Array, "B K C"],
    counts_BK: Int[Array, "B K"],
    head_P: np.ndarray,
    rank_P: np.ndarray,
    window: int,
) -> Int[Array, "B P"]:
    """The prompt position that each pool row holds, −1 for none: kept tokens, then the window."""
    B, _, C = kept_BKC.shape
    count_BP = counts_BK[:, head_P]
    rank = jnp.asarray(rank_P)[None]
    in_window = jnp.minimum(lengths_B, window)[:, None]
    recent = lengths_B[:, None] - in_window + rank - count_BP
    source = jnp.where(rank < count_BP + in_window, recent, -1)
    if C == 0:
        return source
    flat = np.minimum(rank_P, C - 1) + head_P * C
    early = kept_BKC.reshape(B, -1)[:, flat]
    return jnp.where(rank < count_BP, early, source)
