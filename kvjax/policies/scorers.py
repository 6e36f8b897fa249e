"""Token scorers: how much each token of a prompt matters to a head. `LayerView` is their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import AttentionSpec, PoolLayer, PrefillCache
from kvjax.cache.storage import take_rows
from kvjax.checks import SHARE, SIZE, Range, check_ranges
from pallas_kernels import dequantize
from pallas_kernels.entries import NEG_INF, Entries, soft_cap


@flax.struct.dataclass
class LayerView:
    """One layer's entries, each head's in the order of the tokens.

    Z is K if heads hold different tokens, and 1 otherwise.

    Attributes:
        keys, values: [B, K, S, ·], keys rotated; empty slots are zeros.
        queries: [B, w, N, ·] the last w queries, the newest last; for a sequence shorter than w
            the first rows are not queries.
        lengths: [B] int32, tokens of the sequence.
        held: [B, Z] int32, slots in use.
        positions: [B, Z, S] int32, −1 for empty slots. A cache without positions gives ranks
            that end at the newest token.
        seen: state of the scorer's observer, if the scorer has one.
        spec: the layer's scale, soft-cap and sliding window.
        recent: [B] int32, number of last tokens, which are always kept.
    """

    keys: Float[Array, "B K S X"]
    values: Float[Array, "B Kv S Y"]
    queries: Float[Array, "B w N X"]
    lengths: Int[Array, " B"]
    held: Int[Array, "B Z"]
    positions: Int[Array, "B Z S"]
    seen: Any
    recent: Any
    spec: AttentionSpec = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        cache: PrefillCache,
        spec: AttentionSpec,
        recent: Any = None,
        observed: int | None = None,
    ) -> LayerView:
        """The prompt that a cache has read: all tokens of every head.

        Args:
            recent: see the attribute; None for the number of observed queries.
            observed: number of last queries that scorers see; None for all that the cache keeps.
        """
        queries, lengths = cache.queries, cache.lengths
        if observed is not None:
            queries = queries[:, queries.shape[1] - observed :]
        if recent is None:
            recent = jnp.full_like(lengths, queries.shape[1])
        slots = jnp.arange(cache.keys.shape[2], dtype=jnp.int32)[None, None]
        held = lengths[:, None]
        positions = jnp.where(slots < held[..., None], slots, -1)  # a token's slot is its position
        entries = cache.keys, cache.values
        return cls(*entries, queries, lengths, held, positions, cache.seen, recent, spec)

    @classmethod
    def of_pool(
        cls, cache: PoolLayer, entries: PoolEntries, spec: AttentionSpec, recent: Any
    ) -> LayerView:
        """The entries of one layer of a pool; `entries` has each head once."""
        dtype = cache.queries.dtype
        keys, values = (dequantize(part, dtype) for part in (entries.k, entries.v))
        if entries.channels is not None:
            keys = entries.channels.restored(keys, axis=2)
        arrays = (keys, values, cache.queries, cache.lengths, entries.held, entries.positions)
        return cls(*arrays, None, recent, spec)

    @property
    def candidates(self) -> Bool[Array, "B Z S"]:
        """Slots that a head may keep or drop: not recent, and visible to the next query."""
        end = self.lengths[:, None, None]
        found = (self.positions >= 0) & (self.positions < end - self.recent[:, None, None])
        if self.spec.window is not None:
            found &= self.positions > end - self.spec.window
        return found


class PoolEntries(NamedTuple):
    """What a pool holds of one layer, each head's rows from its first one on.

    Attributes:
        k, v: [B, K, S, ·] entries as they are stored.
        held: [B, K] int32, rows in use.
        positions: [B, K, S] int32, −1 for rows not in use.
        channels: the keys' `KeyChannels`; None if they are not normalised.
    """

    k: Entries
    v: Entries
    held: Any
    positions: Any
    channels: Any


def pool_entries(cache: PoolLayer, size: int) -> PoolEntries:
    """The entries of a pool's layer, at most `size` rows per head."""
    pool, starts, held = cache.pool, cache.table("starts"), cache.live(cache.given())
    slots = jnp.arange(size, dtype=jnp.int32)[None, None]
    B, K = held.shape
    live = slots < held[..., None]
    # Gather every head's segment from its first row; rows beyond it become zeros.
    rows = jnp.where(live, starts[..., None] + slots, 0).reshape(B, -1)

    def take(entries: Any) -> Any:
        taken = take_rows(entries, rows, live.reshape(B, -1))
        return jax.tree.map(lambda leaf: leaf.reshape(B, K, size, *leaf.shape[2:]), taken)

    if pool.positions is None:
        # Ranks that end at the newest token replace positions: only the order matters here.
        positions = slots - held[..., None] + pool.lengths[:, None, None]
    else:
        positions = take(pool.positions)
    positions = jnp.where(live, positions, -1)
    return PoolEntries(take(pool.k), take(pool.v), held, positions, cache.channels)


Scorer = Callable[[LayerView], jax.Array]
"""Maps a layer view to token scores [B, K, S] fp32, higher for tokens to keep; only candidates
count.

A scorer sees the queries of the last tokens that a policy keeps. One that looks at another number
of last queries has an attribute `queries`. One that must see all of them has a method
`observer(attention)`, which returns a `kvjax.cache.Observer` for a layer; its state arrives as
`view.seen`.
"""


def queries_seen(scorer: Scorer, observed: int) -> int:
    """Number of last queries that a scorer sees if a policy keeps `observed` last tokens."""
    return getattr(scorer, "queries", observed)


def query_attention(view: LayerView) -> Float[Array, "B N w S"]:
    """Attention of each of the last queries over all keys, fp32; zeros for rows without a query.

    The softmax is over all keys in the cache, causal among the last queries, with the layer's
    scale, soft-cap and sliding window.
    """
    w = view.queries.shape[1]
    at = view.lengths[:, None] - w + jnp.arange(w, dtype=jnp.int32)[None]
    return attention_weights(view.queries, at, view.keys, view.positions, view.spec)


def attention_weights(
    q_BTNX: Float[Array, "B T N X"],
    q_positions: Int[Array, "B T"],
    keys: Float[Array, "B K S X"],
    k_positions: Int[Array, "B Z S"],
    spec: AttentionSpec,
) -> Float[Array, "B N T S"]:
    """Softmax weights of every query over its visible keys; zeros for padding (position < 0)."""
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
    # A row without visible keys is uniform after the softmax: set it to zero.
    return jnp.where(seen, attention, 0.0).reshape(B, N, T, S)


def by_kv_head(weights_BNS: Float[Array, "B N S"], num_kv_heads: int) -> Float[Array, "B K S"]:
    """Mean over the query heads of each group."""
    B, N, S = weights_BNS.shape
    return jnp.mean(weights_BNS.reshape(B, num_kv_heads, N // num_kv_heads, S), axis=2)


NEIGHBOURS = 1024
"""Most tokens around a token that may raise its score, and most last queries that may rate it: a
program looks at each of them."""


@dataclass(frozen=True)
class ObservationWindow:
    """SnapKV (arXiv 2404.14469): the attention that the last w queries pay to a token.

    The score is the mean over these queries and over the query heads of a group, max-pooled over
    neighbouring tokens: a kept token then keeps its neighbours.
    """

    kernel_size: int = 7

    def __post_init__(self):
        check_ranges(vars(self), {"kernel_size": Range(1, NEIGHBOURS, whole=True)})

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        scores_BKS = by_kv_head(window_attention(view), view.keys.shape[1])
        return max_pool(scores_BKS, view.candidates, self.kernel_size)


LEAST_LOG = float(np.log(np.finfo(np.float32).tiny))
"""The logarithm of the smallest attention that counts."""


@dataclass(frozen=True)
class SpanWindow:
    """The strongest attention that a token, or one near it, gets from one of the last queries.

    The query that asks is among the last ones, and attends to one place; a mean over them hides it.
    So a query's attention counts by itself, the last one's in full, and that of each earlier one
    less by the factor `fade`. The query that asks is not always the last one: a chat template ends
    with tokens that ask nothing. So this scorer looks at more queries than those of the tokens that
    are always kept.

    A question attends to the beginning of an answer; the rest of a long answer gets no attention
    until the model writes it. So a token at a distance d after an attended one gets its attention
    times exp(−h(d / ahead)), and one before it exp(−h(d / behind)), with Huber's function h(x) = x²
    up to 1 and 2x − 1 beyond. A token's score is the largest of these parts, as a logarithm. No
    span has a fixed length: it ends where other tokens have more attention. A head that attends to
    one place keeps a long span there, a head that attends to many places short ones.

    Attributes:
        queries: number of last queries.
    """

    ahead: int = 8
    behind: int = 1
    queries: int = 16
    fade: float = 0.9

    def __post_init__(self):
        near = Range(0, NEIGHBOURS, whole=True)
        last = Range(1, NEIGHBOURS, whole=True)
        ranges = {"ahead": near, "behind": near, "queries": last, "fade": SHARE}
        check_ranges(vars(self), ranges)

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        attention, K = query_attention(view), view.keys.shape[1]
        B, N, w, S = attention.shape
        by_head = by_kv_head(attention.reshape(B, N, w * S), K).reshape(B, K, w, S)
        weights = self.fade ** jnp.arange(w - 1, -1, -1, dtype=jnp.float32)
        best = jnp.max(by_head * weights[None, None, :, None], axis=2)
        # A floor keeps the logarithm finite for the tokens without any attention.
        logs = jnp.maximum(jnp.log(jnp.where(view.candidates, best, 0.0)), LEAST_LOG)
        return jnp.maximum(passed_on(logs, self.ahead), passed_on(logs, -self.behind))


def passed_on(logs_BKS: Float[Array, "B K S"], length: int) -> Float[Array, "B K S"]:
    """The largest score among a token's own and those before it, less h(distance / length).

    h is Huber's function, see `SpanWindow`. A negative length looks at the tokens after it.
    """
    if length == 0:
        return logs_BKS
    forward, length, S = length > 0, abs(length), logs_BKS.shape[2]

    def moved(x: jax.Array, by: int) -> jax.Array:
        sides = (by, 0) if forward else (0, by)
        padded = jnp.pad(x, ((0, 0), (0, 0), sides), constant_values=-jnp.inf)
        return padded[..., :S] if forward else padded[..., by:]

    best = logs_BKS
    for d in range(1, length + 1):
        best = jnp.maximum(best, moved(logs_BKS, d) - (d / length) ** 2)
    # Beyond `length` h is a line. Distances that double reach every token that still gets something
    # in float32; one running maximum over slot · slope would round where texts are long.
    by = 1
    while by < S and by * 2 / length < -LEAST_LOG:
        best = jnp.maximum(best, moved(best, by) - by * 2 / length)
        by *= 2
    return best


@dataclass(frozen=True)
class SinksAndRecent:
    """StreamingLLM (arXiv 2309.17453): the first tokens, then the most recent ones."""

    n_sink: int = 4

    def __post_init__(self):
        check_ranges(vars(self), {"n_sink": SIZE})

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        # The slot number as score ranks recent tokens first; S is above every slot number.
        B, K, S, _ = view.keys.shape
        slot = jnp.arange(S, dtype=jnp.int32)
        score = jnp.where(slot < self.n_sink, S, slot).astype(jnp.float32)
        return jnp.broadcast_to(score[None, None], (B, K, S))


@dataclass(frozen=True)
class LastQuery:
    """TOVA (arXiv 2401.06104): the attention of the last query, averaged over all heads.

    All heads of a layer get the same scores.
    """

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        B, K, S, _ = view.keys.shape
        last = query_attention(view)[:, :, -1]
        mean = jnp.mean(last, axis=1, keepdims=True)
        return jnp.broadcast_to(mean, (B, K, S))


@dataclass(frozen=True)
class KeyNorm:
    """KNorm (arXiv 2406.11430): −‖k‖₂, because keys of small norm draw much attention."""

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        return -jnp.linalg.norm(view.keys.astype(jnp.float32), axis=-1)


@dataclass(frozen=True)
class KeyDifference:
    """KeyDiff (arXiv 2504.15364): −cos(k, mean of the normalised keys); unlike keys rank high."""

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        keys = view.keys.astype(jnp.float32)
        norm = jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        unit = keys / norm  # empty slots are zeros and add nothing to the mean
        anchor = jnp.sum(unit, axis=2, keepdims=True)
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=-1, keepdims=True), 1e-12)
        return -jnp.sum(unit * anchor, axis=-1)


def window_attention(view: LayerView) -> Float[Array, "B N S"]:
    """Attention of the last queries over all keys, averaged over the queries, fp32."""
    total = jnp.sum(query_attention(view), axis=2)
    queries = jnp.minimum(view.lengths, view.queries.shape[1]).astype(jnp.float32)
    return total / queries[:, None, None]


def max_pool(
    scores_BKS: Float[Array, "B K S"], candidates_BZS: Bool[Array, "B Z S"], size: int
) -> Float[Array, "B K S"]:
    """The largest score of a candidate among `size` neighbours, stride 1, same length."""
    scores = jnp.where(candidates_BZS, scores_BKS, -jnp.inf)
    return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, (1, 1, size), (1, 1, 1), "SAME")
