"""Compression of one layer's prompt: tokens are chosen and packed into the cache of decoding.

A scorer rates every token for every head. Each head keeps the `cap` best tokens and the last w
tokens, the recent ones. On ties the later position wins. Kept tokens stay in the order of the text.

`rank_heads` scores and sorts; it knows no budget. Policies that differ only in their budgets share
its result. `compress_heads` selects and packs for each policy; it knows no scorer.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import (
    AttentionSpec,
    DenseCache,
    LatentCache,
    PoolLayer,
    PrefillCache,
    ShardedHeads,
)
from kvjax.cache.channels import KeyChannels
from kvjax.cache.pool import copy_rows, lay_segments
from kvjax.cache.room import spread_like, whole_of
from kvjax.cache.sharded import specs
from kvjax.cache.storage import take_rows, whole_slots
from kvjax.mesh import Placement
from kvjax.policies.budgets import Sharing
from kvjax.policies.scorers import LayerView, Scorer, pool_entries
from pallas_kernels.entries import ENCODED, Entries


@flax.struct.dataclass
class LayerBudget:
    """The budgets of the heads of one layer. All fields are data: no program depends on a value.

    Attributes:
        caps: [B, K] int32, tokens that a head keeps besides the recent ones.
        recent: [B] int32, number of last tokens, which are always kept.
        rooms: [B, K] int32, rows for new tokens.
        rings: [B, K] bool, whether new tokens overwrite older ones when a head's room is used up.
        shared: [] bool, whether the heads share the sum of the caps by the token scores.
        first: [B, D] int32, the layer's first row in the pool of each of D devices.
    """

    caps: Any
    recent: Any
    rooms: Any
    rings: Any
    shared: Any
    first: Any


@flax.struct.dataclass
class Ranking:
    """The tokens of one layer's prompt, rated and sorted; K is 1 for common tokens.

    Attributes:
        scores: [B, K, S] fp32, of each slot.
        rising: [B, K, S] int32, the `sort_keys` of the scores, sorted.
    """

    scores: Any
    rising: Any

    @classmethod
    def of(cls, scores: Float[Array, "B K S"], candidates: Bool[Array, "B Z S"]) -> Ranking:
        """Sorts the keys of candidates."""
        return cls(scores, jnp.sort(sort_keys(scores, candidates), axis=-1))

    def select(
        self, candidates: Bool[Array, "B Z S"], counts: Int[Array, "B K"]
    ) -> Int[Array, "B K S"]:
        """The `counts` best candidates of each head, see `select`."""
        return select(sort_keys(self.scores, candidates), self.rising, counts)


@functools.partial(jax.jit, static_argnames=("scorer", "spec", "observed", "placement"))
def rank_heads(
    prefilled: PrefillCache,
    recent: Int[Array | np.ndarray, " B"],
    *,
    scorer: Scorer,
    spec: AttentionSpec,
    observed: int,
    placement: Placement | None,
) -> Ranking:
    """Ranks the tokens of a prompt for each head of the layer.

    Args:
        recent: number of last tokens, which are not candidates.
        observed: number of last queries that the scorer sees.
    """
    view = LayerView.create(prefilled, spec, recent, observed)
    with jax.named_scope("rank"):
        ranking = Ranking.of(token_scores(view, scorer), view.candidates)
    if placement is None:
        return ranking
    # `compress_heads` is compiled for the shardings of its arguments: no scorer may change them.
    sharded = ranking.rising.shape[1] % placement.ways == 0
    return jax.tree.map(
        lambda x: placement.place(x, "batch", "tensor" if sharded else None), ranking
    )


@functools.partial(jax.jit, static_argnames=("scorer", "spec", "observed"))
def rank_common(
    prefilled: PrefillCache,
    recent: Int[Array | np.ndarray, " B"],
    *,
    scorer: Scorer,
    spec: AttentionSpec,
    observed: int,
) -> Ranking:
    """`rank_heads` for a layer whose heads all keep the same tokens: scores are averaged over the
    streams that a scorer rates."""
    whole = dataclasses.replace(prefilled, base=whole_of(prefilled.base))
    view = LayerView.create(whole, spec, recent, observed)
    with jax.named_scope("rank"):
        scores = jnp.mean(token_scores(view, scorer), axis=1, keepdims=True)
        return Ranking.of(scores, view.candidates)


def choose(
    view: LayerView, ranking: Ranking, sharing: Sharing, budget: LayerBudget
) -> tuple[Int[Array, "B K S"], Int[Array, "B K"]]:
    """The slots that every head keeps, in the order of the text, and their number.

    A head keeps min(cap, n − w) + w entries of a sequence of n tokens, or n if it is shorter than
    w. Slots beyond a head's number are meaningless.
    """
    K = ranking.scores.shape[1]
    counts = jax.lax.cond(
        budget.shared,
        lambda: sharing(ranking.scores, view.candidates, budget.caps),
        lambda: jnp.minimum(budget.caps, available_tokens(view.candidates, K)),
    )
    return with_recent(view, ranking.select(view.candidates, counts), counts)


def token_scores(view: LayerView, scorer: Scorer) -> Float[Array, "B K S"]:
    """The scorer's numbers, with −inf in place of NaN, so that NaN displaces no other token."""
    scores = scorer(view).astype(jnp.float32)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def available_tokens(candidates_BZS: Bool[Array, "B Z S"], heads: int) -> Int[Array, "B K"]:
    """Number of candidates of every head."""
    count = jnp.sum(candidates_BZS, axis=2, dtype=jnp.int32)
    return jnp.broadcast_to(count, (count.shape[0], heads))


def sort_keys(
    scores_BKS: Float[Array, "B K S"], candidates_BZS: Bool[Array, "B Z S"]
) -> Int[Array, "B K S"]:
    """Whole numbers in the order of the scores; slots that are not candidates come below all.

    On a CPU, sorting one array of whole numbers is about ten times as fast as sorting floats with
    their indices.
    """
    scores = jnp.where(candidates_BZS, scores_BKS, -jnp.inf)
    # A candidate whose score is −inf still ranks before slots that are not candidates.
    scores = jnp.where(candidates_BZS, jnp.maximum(scores, jnp.finfo(scores.dtype).min), scores)
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(bits == jnp.iinfo(jnp.int32).min, 0, bits)  # −0.0 equals 0.0
    # A float's bits are its sign, then its magnitude. Negative floats fall as their bits rise.
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def select(
    keys_BKS: Int[Array, "B K S"], rising_BKS: Int[Array, "B K S"], counts_BK: Int[Array, "B K"]
) -> Int[Array, "B K S"]:
    """Slots of the largest keys of every head, ascending; S in the places beyond its count.

    Args:
        rising_BKS: the keys, sorted.
        counts_BK: number of candidates that each head keeps.
    """
    S = keys_BKS.shape[2]
    slots = jnp.arange(S, dtype=jnp.int32)[None, None]
    last = jnp.minimum(S - counts_BK, S - 1)[:, :, None]
    least = jnp.take_along_axis(rising_BKS, last, axis=2)
    above, equal = keys_BKS > least, keys_BKS == least
    # Keys above the least kept key stay. Of the keys that equal it, the latest positions stay.
    left = counts_BK - jnp.sum(above, axis=2, dtype=jnp.int32)
    number = jax.lax.cumsum(equal.astype(jnp.int32), axis=2, reverse=True)
    kept = above | (equal & (number <= left[:, :, None]))
    return jnp.sort(jnp.where(kept, slots, S), axis=-1)


def with_recent(
    view: LayerView, kept_BKS: Int[Array, "B K S"], counts_BK: Int[Array, "B K"]
) -> tuple[Int[Array, "B K S"], Int[Array, "B K"]]:
    """The kept slots followed by those of the recent tokens, and their total number."""
    held = jnp.broadcast_to(view.held, counts_BK.shape)
    recent = jnp.minimum(held, view.recent[:, None])
    rank = jnp.arange(kept_BKS.shape[2], dtype=jnp.int32)[None, None]
    count = counts_BK[:, :, None]
    slots = jnp.where(rank < count, kept_BKS, (held - recent)[:, :, None] + rank - count)
    return jnp.clip(slots, 0, kept_BKS.shape[2] - 1), counts_BK + recent


@functools.partial(
    jax.jit,
    static_argnames=("sharing", "spec", "remembered", "placement", "copies"),
    donate_argnames="layer",
)
def compress_heads(
    prefilled: PrefillCache,
    ranking: Ranking,
    layer: PoolLayer,
    budget: LayerBudget,
    *,
    sharing: Sharing,
    spec: AttentionSpec,
    remembered: int,
    placement: Placement | None,
    copies: int,
) -> PoolLayer:
    """Compresses one layer's prompt into the pool.

    Args:
        ranking: from `rank_heads`, with the same number of recent tokens.
        remembered: number of last queries that the layer keeps, for compression while decoding.
        copies: see `ShardedHeads`; `layer` has each head this many times.
    """
    view = LayerView.create(prefilled, spec, budget.recent, remembered)
    with jax.named_scope("select"):
        source, held = choose(view, ranking, sharing, budget)
    entries = view.keys, view.values
    if isinstance(prefilled.base, ShardedHeads):  # as stored: each head `copies` times
        entries = prefilled.base.inner.keys_and_values(view.keys.dtype)
    layer = pack(layer, view.positions, entries, source, held, budget, spec, placement, copies)
    return dataclasses.replace(layer, queries=view.queries) if remembered else layer


@functools.partial(
    jax.jit,
    static_argnames=("scorer", "sharing", "spec", "size", "placement", "copies"),
    donate_argnames="layer",
)
def compress_again(
    layer: PoolLayer,
    budget: LayerBudget,
    *,
    scorer: Scorer,
    sharing: Sharing,
    spec: AttentionSpec,
    size: int,
    placement: Placement | None,
    copies: int,
) -> PoolLayer:
    """Cuts a layer's segments down to their budgets again.

    Args:
        size: upper bound on the rows of a segment.
    """

    read = functools.partial(pool_entries, size=size)
    if placement is None:
        found = read(layer)
    else:
        heads = placement.spec("batch", "tensor")
        found = placement.run(read, (specs(layer, placement),), heads)(layer)
    # The choice needs every head once. Rows move as they are stored.
    once = jax.tree.map(lambda x: x[:, ::copies], found)
    view = LayerView.of_pool(layer, once, spec, budget.recent)
    with jax.named_scope("select"):
        ranking = Ranking.of(token_scores(view, scorer), view.candidates)
        source, held = choose(view, ranking, sharing, budget)
    entries = found.k, found.v
    return pack(layer, view.positions, entries, source, held, budget, spec, placement, copies)


def pack(
    layer: PoolLayer,
    positions_BZS: Int[Array, "B Z S"],
    entries: tuple[Entries, Entries],
    source_BKS: Int[Array, "B K S"],
    held_BK: Int[Array, "B K"],
    budget: LayerBudget,
    spec: AttentionSpec,
    placement: Placement | None,
    copies: int,
) -> PoolLayer:
    """Copies the chosen slots of every head into its segment.

    Args:
        entries: keys and values [B, K · copies, S, ·]; floats, or rows of this pool as stored.
        source_BKS, held_BK: from `choose`, for each head once.
    """
    shared = positions_BZS.shape[1] == 1
    if copies > 1:
        source_BKS, held_BK = (jnp.repeat(x, copies, axis=1) for x in (source_BKS, held_BK))
        positions_BZS = positions_BZS if shared else jnp.repeat(positions_BZS, copies, axis=1)

    def run(layer, keys, values, positions, source, held, rooms, rings, first):
        pool = lay_segments(layer.pool, layer.row, held, first[:, 0], rooms, rings, spec.window)
        starts = jax.lax.dynamic_index_in_dim(pool.starts, layer.row, 1, keepdims=False)
        channels = None
        # Keys of a prompt are floats; those of a pool are stored and normalised already.
        if pool.channels is not None and not isinstance(keys, ENCODED):
            channels = KeyChannels.of_prompt(keys, positions >= 0, spec)
            channels_of_all = pool.channels.with_layer(layer.row, channels)
            pool = dataclasses.replace(pool, channels=channels_of_all)

        def copy(into: Any, entries: Any, channels: KeyChannels | None = None) -> Any:
            def rows(b, k, ranks):
                def take(leaf):
                    # Positions that all heads share have a single row for all of them (Z = 1).
                    return leaf[b, jnp.minimum(k, leaf.shape[1] - 1), source[b, k, ranks]]

                taken = jax.tree.map(take, entries)
                return taken if channels is None else channels.head(b, k).normalised(taken, axis=0)

            return copy_rows(into, rows, starts, held)

        moved = {"k": copy(pool.k, keys, channels), "v": copy(pool.v, values)}
        if pool.positions is not None:
            moved["positions"] = copy(pool.positions, positions)
        return dataclasses.replace(layer, pool=dataclasses.replace(pool, **moved))

    arrays = (*entries, positions_BZS, source_BKS, held_BK)
    with jax.named_scope("pack"):
        if placement is None:
            return run(layer, *arrays, budget.rooms, budget.rings, budget.first)
        heads, rows = placement.spec("batch", "tensor"), placement.spec("batch")
        placed = (heads, heads, rows if shared else heads, heads, heads, heads, heads, heads)
        parts = specs(layer, placement)
        call = placement.run(run, (parts, *placed), parts)
        return call(layer, *arrays, budget.rooms, budget.rings, budget.first)


@functools.partial(jax.jit, static_argnames=("slots", "spec", "dtype"))
def compress_tokens(
    prefilled: PrefillCache,
    ranking: Ranking,
    caps: Int[Array, " B"],
    recent: Int[Array, " B"],
    *,
    slots: int,
    spec: AttentionSpec,
    dtype: str | None,
) -> Any:
    """Compresses a prompt to one set of tokens for all heads of the layer.

    Args:
        ranking: from `rank_common`, with the same number of recent tokens.
        slots: number of slots of the smaller cache, room for new tokens included.
    """
    # The choice needs all heads and slots of a sharded cache at once.
    whole = dataclasses.replace(prefilled, base=whole_of(prefilled.base))
    view = LayerView.create(whole, spec, recent)
    with jax.named_scope("select"):
        counts = jnp.minimum(caps[:, None], available_tokens(view.candidates, 1))
        source, held = with_recent(view, ranking.select(view.candidates, counts), counts)
    slots = whole_slots(slots)
    with jax.named_scope("pack"):
        # One row of slots for all heads, padded or cut to the size of the new cache.
        source = jnp.pad(source[:, 0], ((0, 0), (0, max(slots - source.shape[2], 0))))[:, :slots]
        live = jnp.arange(slots, dtype=jnp.int32)[None] < held
        common = {"lengths": view.lengths, "evicted": view.lengths - held[:, 0]}
        positions, base = jnp.where(live, source, -1), whole.base
        if isinstance(base, LatentCache):
            parts = (base.latent, base.k_rope)
            packed = (take_rows(part, source, live) for part in parts)
            # A sliding window needs positions here: slots differ from them once tokens are gone.
            kept = None if spec.window is None else positions
            cache = LatentCache(*packed, **common, positions=kept)
            return spread_like(prefilled.base, cache.cast(dtype, live, spec), spec.window)
        take = jax.vmap(take_rows, in_axes=(1, None, None), out_axes=1)
        packed = (take(part, source, live) for part in (base.k, base.v))
        cache = DenseCache(*packed, **common, positions=positions)
        return spread_like(prefilled.base, cache.cast(dtype, live, spec), spec.window)
