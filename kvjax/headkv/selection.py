"""Which tokens a head keeps, and packing them into a smaller cache.

A scorer gives every token of every head a number; each head keeps the `cap` best besides the
window, the last w tokens. Ties go to the later position; what is kept stays in the order of time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import DenseCache, HeadBudgetCache, LatentCache, PromptCache
from kvjax.cache.entries import take_rows
from kvjax.cache.head_budget import pool_alignment, static_segments
from kvjax.headkv.prompt import Prompt, Scorer
from kvjax.headkv.share import PromptShare, prompt_caps
from kvjax.headkv.split import Split
from pallas_kernels.quantized import Entries, Quantized, is_quantized, quantize
from pallas_kernels.segments import Segments, TracedSegments

Caps = tuple[int, ...]
"""Budget of each KV head of a layer, the window not included."""


@dataclass(frozen=True)
class Keep:
    """How a layer's cache is cut down.

    Attributes:
        caps: budget of each KV head; where all heads must keep the same tokens, one for all.
        scorer: rates the tokens.
        split: moves budgets between the heads of a layer by the scores of a prompt; None: the
            caps hold as they are.
        dtype: of the entries that stay, "int8" or "float8_e4m3fn" for 8 bits; None for the
            model's own.
        rooms: rows for new tokens of each head.
        rings: whether a head's new tokens, beyond its room, take the place of older ones.
        remember: whether the last queries stay, for compression while decoding.
        share: makes the caps a share of each prompt; None: they hold as they are.
    """

    caps: Caps
    scorer: Scorer
    split: Split | None
    dtype: str | None
    rooms: tuple[int, ...]
    rings: tuple[bool, ...]
    remember: bool = False
    share: PromptShare | None = None

    def caps_of(self, prompt: Prompt) -> Int[Array, "#B K"]:
        """The budgets that hold for each sequence."""
        return prompt_caps(self.share, self.caps, prompt.lengths)


def compress_heads(prompt: Prompt, keep: Keep) -> HeadBudgetCache:
    """The prompt cut down to each head's budget.

    A sequence of n tokens keeps min(cap, n − w) + w entries in a head, n if it is shorter than w.
    """
    kept, counts = choose(prompt, keep)
    with jax.named_scope("pack"):
        segments, rows = segments_for(prompt, keep, counts)
        return pack(prompt, kept, counts, segments, rows, keep)


def choose(prompt: Prompt, keep: Keep) -> tuple[Int[Array, "B K C"], Int[Array, "B K"]]:
    """The slots that every head keeps besides the window, ascending, and how many they are."""
    K = prompt.keys.shape[1]
    with jax.named_scope("select"):
        scores = prompt_scores(prompt, keep.scorer)
        available = available_tokens(prompt.candidates, K)
        caps = keep.caps_of(prompt)
        if keep.split is None:
            counts, most = jnp.minimum(caps, available), max(keep.caps)
        else:
            counts, most = keep.split(scores, prompt.candidates, caps), sum(keep.caps)
        return select(scores, prompt.candidates, counts, most), counts


def compress_tokens(cache: PromptCache, prompt: Prompt, keep: Keep) -> DenseCache | LatentCache:
    """The prompt cut down to one set of tokens for all heads of the layer.

    The budget is keep.caps[0]; scores are averaged over the streams that a scorer rates.
    """
    with jax.named_scope("select"):
        scores = jnp.mean(prompt_scores(prompt, keep.scorer), axis=1, keepdims=True)
        cap = keep.caps[0]
        counts = jnp.minimum(keep.caps_of(prompt), available_tokens(prompt.candidates, 1))
        kept = select(scores, prompt.candidates, counts, cap)
    with jax.named_scope("pack"):
        rows = cap + prompt.window + keep.rooms[0]
        rank = jnp.arange(rows, dtype=jnp.int32)[None]
        source = source_slots(prompt, kept, counts, jnp.zeros_like(rank), rank)
        live = source >= 0
        index = jnp.maximum(source, 0)
        held = counts[:, 0] + jnp.minimum(prompt.lengths, prompt.window)
        common = {"lengths": prompt.lengths, "evicted": prompt.lengths - held}
        base = cache.base
        if isinstance(base, LatentCache):
            parts = (base.latent, base.k_rope)
            packed = (store(take_rows(part, index, live), keep.dtype) for part in parts)
            # Slots tell a sliding window nothing where tokens between them are gone.
            positions = None if prompt.spec.window is None else source
            return LatentCache(*packed, **common, positions=positions)
        take = jax.vmap(take_rows, in_axes=(1, None, None), out_axes=1)
        packed = (store(take(part, index, live), keep.dtype) for part in (base.k, base.v))
        return DenseCache(*packed, **common, positions=source)


def prompt_scores(prompt: Prompt, scorer: Scorer) -> Float[Array, "B K S"]:
    """The scorer's numbers; NaN counts as the lowest, so that it displaces nothing."""
    scores = scorer(prompt)
    return jnp.where(jnp.isnan(scores), -jnp.inf, scores)


def available_tokens(candidates_BZS: Bool[Array, "B Z S"], heads: int) -> Int[Array, "B K"]:
    """Candidates of every head."""
    count = jnp.sum(candidates_BZS, axis=2, dtype=jnp.int32)
    return jnp.broadcast_to(count, (count.shape[0], heads))


def select(
    scores_BKS: Float[Array, "B K S"],
    candidates_BZS: Bool[Array, "B Z S"],
    counts_BK: Int[Array, "B K"],
    most: int,
) -> Int[Array, "B K C"]:
    """The best candidates of every head, in ascending order; S beyond the head's count.

    Args:
        counts_BK: how many each head keeps, at most its candidates.
        most: a bound on the counts; C = min(most, S).
    """
    S = scores_BKS.shape[2]
    scores = jnp.where(candidates_BZS, scores_BKS, -jnp.inf)
    # Candidates whose score is −inf still come before what is no candidate.
    scores = jnp.where(candidates_BZS, jnp.maximum(scores, jnp.finfo(scores.dtype).min), scores)
    # top_k prefers the lower index; on the reversed row that is the later position.
    _, reversed_slots = jax.lax.top_k(scores[:, :, ::-1], min(most, S))
    rank = jnp.arange(reversed_slots.shape[2], dtype=jnp.int32)[None, None]
    kept = jnp.where(rank < counts_BK[:, :, None], S - 1 - reversed_slots, S)
    return jnp.sort(kept, axis=-1)


def segments_for(prompt: Prompt, keep: Keep, counts_BK: Int[Array, "B K"]) -> tuple[Segments, int]:
    """Segments for what heads keep, the window and their rooms, and the rows of the pool."""
    dtype = keep.dtype or prompt.keys.dtype
    if keep.split is None:
        return static_segments(capacities_for(prompt, keep), pool_alignment(dtype))
    extra = jnp.asarray([prompt.window + room for room in keep.rooms], jnp.int32)
    return counted_segments(prompt, keep, counts_BK, extra, pool_alignment(dtype))


def capacities_for(prompt: Prompt, keep: Keep) -> list[int]:
    """Rows of every head whose budget is its cap."""
    limit = capacity_limit(prompt, keep)
    most = zip(keep.caps, keep.rooms, strict=True)
    return [min(cap + prompt.window + room, limit) for cap, room in most]


def counted_segments(
    prompt: Prompt,
    keep: Keep,
    counts_BK: Int[Array, "B K"],
    extra_K: Int[Array, " K"],
    align: int,
) -> tuple[TracedSegments, int]:
    """Segments where heads share a budget by the scores of each prompt.

    Args:
        counts_BK, extra_K: rows of the heads at hand, kept and for the window and new tokens; the
            pool has room for all of the layer's budget.
        align: what the platform asks for.
    """
    align = max(split_alignment(capacities_for(prompt, keep)), align)
    wanted = jnp.minimum(counts_BK + extra_K[None], capacity_limit(prompt, keep))
    rounded = -(-wanted // align) * align
    starts = jnp.cumsum(rounded, axis=1, dtype=jnp.int32) - rounded
    total = sum(keep.caps) + sum(prompt.window + room for room in keep.rooms)
    rows = -(-(total + len(keep.caps) * (align - 1)) // align) * align
    return TracedSegments(starts, wanted, align), rows


def split_alignment(capacities: Sequence[int]) -> int:
    """Rows that segments of a split are rounded to: about a sixteenth of a head's, 8 at most."""
    mean = sum(capacities) / len(capacities)
    return next((size for size in (8, 4, 2) if 16 * size <= mean), 1)


def capacity_limit(prompt: Prompt, keep: Keep) -> int:
    """Rows that a head can use at all.

    Behind a sliding window nothing is seen again. A cache that is compressed while decoding may
    fill budgets that the prompt does not.
    """
    most = sum(keep.caps) if keep.split else max(keep.caps)
    reach = most + prompt.window if keep.remember else prompt.keys.shape[2]
    return prompt.spec.window or reach + max(keep.rooms)


def pack(
    prompt: Prompt,
    kept_BKC: Int[Array, "B K C"],
    counts_BK: Int[Array, "B K"],
    segments: Segments,
    rows: int,
    keep: Keep,
    rings_K: Bool[Array, " K"] | None = None,
) -> HeadBudgetCache:
    """Gathers the kept tokens and the window of every head into one flat pool.

    Args:
        rings_K: keep.rings of the heads at hand; None where they are all of the layer's.
    """
    B, K, S, _ = prompt.keys.shape
    head_P, rank_P = segments.rows(rows)
    head_P = jnp.broadcast_to(head_P, (B, rows))
    source = source_slots(prompt, kept_BKC, counts_BK, head_P, rank_P)
    live = source >= 0
    index = head_P * S + jnp.maximum(source, 0)

    def gather(entries: jax.Array) -> Entries:
        return store(take_rows(entries.reshape(B, K * S, -1), index, live), keep.dtype)

    held = counts_BK + jnp.minimum(prompt.held, prompt.window)
    _, capacities = segments.arrays()
    rings = (jnp.asarray(keep.rings) if rings_K is None else rings_K)[None]
    # A sliding window's ring is the whole segment: what falls out of sight is the oldest.
    first = jnp.zeros_like(held) if prompt.spec.window is not None else held
    ring_starts = jnp.where(rings, first, capacities) if any(keep.rings) else None
    positions = None
    if prompt.spec.window is not None:
        spread = jnp.broadcast_to(prompt.positions, (B, K, S)).reshape(B, K * S)
        positions = jnp.where(live, jnp.take_along_axis(spread, index, axis=1), -1)
    return HeadBudgetCache(
        k_pool=gather(prompt.keys),
        v_pool=gather(prompt.values),
        head_lengths=held,
        lengths=prompt.lengths,
        segments=segments,
        positions=positions,
        ring_starts=ring_starts,
        queries=prompt.queries if keep.remember else None,
    )


def source_slots(
    prompt: Prompt,
    kept_BKC: Int[Array, "B K C"],
    counts_BK: Int[Array, "B K"],
    head_BP: Int[Array, "_ P"],
    rank_BP: Int[Array, "_ P"],
) -> Int[Array, "B P"]:
    """The slot of its head that each row takes, −1 for none: kept tokens, then the window."""
    B, K, C = kept_BKC.shape
    shape = (B, head_BP.shape[1])
    head, rank = jnp.broadcast_to(head_BP, shape), jnp.broadcast_to(rank_BP, shape)
    count = jnp.take_along_axis(counts_BK, head, axis=1)
    held = jnp.take_along_axis(jnp.broadcast_to(prompt.held, (B, K)), head, axis=1)
    in_window = jnp.minimum(held, prompt.window)
    source = jnp.where(rank < count + in_window, held - in_window + rank - count, -1)
    if C == 0:
        return source
    index = head * C + jnp.clip(rank, 0, C - 1)
    early = jnp.take_along_axis(kept_BKC.reshape(B, K * C), index, axis=1)
    return jnp.where(rank < count, early, source)


def store(entries: Entries, dtype: str | None) -> Entries:
    """Entries in the dtype that stays; None, or what is quantized already, leaves them."""
    if dtype is None or isinstance(entries, Quantized):
        return entries
    return quantize(entries, jnp.dtype(dtype)) if is_quantized(dtype) else entries.astype(dtype)
