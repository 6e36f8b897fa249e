"""The head-budgeted cache: every KV head has a segment of its own length in one flat pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import slots
from kvjax.cache.attention import AttentionSpec, Expand, cached_attention
from kvjax.cache.entries import empty
from kvjax.cache.prompt import last_queries
from pallas_kernels import ragged_gqa_decode
from pallas_kernels.combine import merge
from pallas_kernels.ragged_blocks import attend
from pallas_kernels.segments import BLOCK_SIZES, LARGE_BLOCKS, NOWHERE, Segments, StaticSegments

QUERY_TILE = 32  # queries that meet the blocks of a pool at a time
FOREVER = NOWHERE // 2


@flax.struct.dataclass
class HeadBudgetCache:
    """Keys and values of the tokens that each KV head keeps, and of the tokens that come later.

    A head's live rows are the first of its segment, in the order of time. Where the segments are
    static, the arrays are as small as the budgets are and a new token is one write per head.

    A head may have a ring: rows at the end of its segment that new tokens overwrite in turn, so
    that it keeps its part of the prompt and the most recent tokens however long the text grows.

    Attributes:
        k_pool, v_pool: [B, P, ·] arrays or `Quantized`.
        head_lengths: [B, K] int32, entries given to each head; above its capacity the surplus was
            dropped, or has taken the place of older entries in the ring.
        lengths: [B] int32, tokens that the sequence has given in all: the next one's position.
        segments: where each head's rows lie.
        positions: [B, P] int32, the entries' positions, −1 for none; None where nobody asks:
            without a sliding window.
        ring_starts: [B, K] int32, rank of the first row of each head's ring; its capacity for a
            head without one. None: no head has one.
        queries: [B, w, N, H] the last queries, for compression while decoding; None for none.
    """

    k_pool: Any
    v_pool: Any
    head_lengths: Any
    lengths: Any
    segments: Any
    positions: Any = None
    ring_starts: Any = None
    queries: Any = None

    @classmethod
    def create(
        cls,
        batch: int,
        capacities: Sequence[int],
        key_dim: int,
        value_dim: int,
        dtype,
        keep_positions: bool = False,
        align: int = 1,
    ) -> HeadBudgetCache:
        """An empty cache with static segments that start at multiples of `align` rows.

        On accelerators `align` is the rows of a DMA tile: 8 for 4-byte entries, 16 for 2-byte and
        32 for 1-byte ones. CPUs need none.
        """
        segments, rows = static_segments(capacities, align)
        return cls(
            k_pool=empty((batch, rows, key_dim), dtype),
            v_pool=empty((batch, rows, value_dim), dtype),
            head_lengths=jnp.zeros((batch, segments.num_heads), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            segments=segments,
            positions=jnp.full((batch, rows), -1, jnp.int32) if keep_positions else None,
        )

    @property
    def capacity(self) -> jax.Array:
        """[B] tokens that a sequence can give in all: its fullest head without a ring decides."""
        _, capacities = self.segments.arrays()
        room = capacities - self.head_lengths
        if self.ring_starts is not None:
            room = jnp.where(self.ring_starts < capacities, FOREVER, room)
        return self.lengths + jnp.min(room, axis=1)

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> HeadBudgetCache:
        """Stores the new entries [B, T, K, ·] where position ≥ 0, in every head."""
        count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        rows_BTK = self._new_rows(positions, count)
        held = self.positions
        if held is not None:
            new = jnp.broadcast_to(positions[:, :, None], rows_BTK.shape)
            held = slots.write_pool(held, new, rows_BTK)
        with jax.named_scope("cache_update"):
            return dataclasses.replace(
                self,
                k_pool=slots.write_pool(self.k_pool, k, rows_BTK),
                v_pool=slots.write_pool(self.v_pool, v, rows_BTK),
                positions=held,
                head_lengths=self.head_lengths + count[:, None],
                lengths=self.lengths + count,
            )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], HeadBudgetCache]:
        """See `Cache.attend`. Of several new tokens each sees all that was held before them.

        Raises:
            NotImplementedError: keys are to be rebuilt from latents with `expand`.
            ValueError: a sliding window, but the cache was made without positions.
        """
        if expand is not None:
            raise NotImplementedError(
                "a head-budgeted cache cannot rebuild keys from latents: its heads keep different "
                "tokens, so there is no common row of positions to rotate"
            )
        if spec.window is not None and self.positions is None:
            raise ValueError("a layer with a sliding window needs a cache with keep_positions=True")
        cache = self.append(k, v, positions)
        if self.queries is not None:
            queries = last_queries(self.queries, q, positions)
            cache = dataclasses.replace(cache, queries=queries)
        with jax.named_scope("attend"):
            if q.shape[1] == 1:
                return cache._decode(q[:, 0], positions[:, 0], spec)[:, None], cache
            return self._attend_many(q, k, v, positions, spec), cache

    def live_heads(self) -> Int[Array, "B K"]:
        """Live rows of each segment."""
        return jnp.minimum(self.head_lengths, self.segments.arrays()[1])

    def _new_rows(self, positions_BT: jax.Array, count_B: jax.Array) -> Int[Array, "B T K"]:
        """Where new tokens go; beyond the pool for padding and what has no place."""
        starts, capacities = (x[:, None] for x in self.segments.arrays())
        steps = slots.query_slots(jnp.zeros_like(self.lengths), positions_BT)[:, :, None]
        rank = self.head_lengths[:, None] + steps
        fits = steps >= 0
        if self.ring_starts is not None:
            first = self.ring_starts[:, None]
            ring = capacities - first
            turned = first + (rank - first) % jnp.maximum(ring, 1)
            # Of tokens that share a row only the newest is written.
            newest = (self.head_lengths + count_B[:, None] - 1)[:, None]
            fits &= (ring == 0) | (rank < first) | (rank + ring > newest)
            rank = jnp.where((ring > 0) & (rank >= first), turned, rank)
        fits &= rank < capacities
        return jnp.where(fits, starts + rank, self.k_pool.shape[1])

    def _decode(
        self, q_BNH: jax.Array, position_B: jax.Array, spec: AttentionSpec
    ) -> Float[Array, "B N Y"]:
        segments: Segments = self.segments
        seen = self._window(position_B[:, None], spec)
        return ragged_gqa_decode(
            q_BNH,
            self.k_pool,
            self.v_pool,
            segments.starts,
            self.live_heads(),
            capacities=segments.capacities,
            align=segments.align,
            span=segments.span,
            live=None if seen is None else seen[:, 0],
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def _attend_many(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, spec: AttentionSpec
    ) -> Float[Array, "B T N Y"]:
        """Several new tokens: over what the pool holds, and causally among themselves."""
        live, outs, lses = self.live_heads(), [], []
        for start in range(0, q.shape[1], QUERY_TILE):
            tile = slice(start, start + QUERY_TILE)
            seen = self._window(positions[:, tile], spec)
            settings = (self.segments, live, spec.scale, spec.softcap, seen)
            out, lse = attend(q[:, tile], self.k_pool, self.v_pool, *settings)
            outs.append(out)
            lses.append(lse)
        old = jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=1)
        keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        new = cached_attention(q, keys, values, positions, positions, spec)
        return merge(old, new)[0].astype(q.dtype)

    def _window(self, positions_BT: jax.Array, spec: AttentionSpec) -> Bool[Array, "B T P"] | None:
        """Rows inside each query's sliding window; None where there is none."""
        if spec.window is None:
            return None
        oldest = positions_BT[:, :, None] - spec.window
        return self.positions[:, None] > oldest


def static_segments(capacities: Sequence[int], align: int) -> tuple[StaticSegments, int]:
    """Segments one after the other, each start a multiple of `align`, and the rows of the pool.

    Where any start will do, segments start at whole blocks (see `pallas_kernels.ragged_blocks`),
    the largest that add less than a twelfth: a block that two heads share costs twice. Otherwise
    the pool ends at one, the largest that adds less than a sixteenth, or the smallest.
    """
    if align < 1:
        raise ValueError(f"align is {align}, expected at least 1")
    if align == 1:
        align = next((size for size in LARGE_BLOCKS if _padding(capacities, size) < 1 / 12), 1)
    ends = np.cumsum([-(-capacity // align) * align for capacity in capacities])
    block = next((size for size in BLOCK_SIZES if ends[-1] >= 16 * size), BLOCK_SIZES[-1])
    if align in LARGE_BLOCKS:
        block = min(block, align)
    starts = (0, *(int(end) for end in ends[:-1]))
    return StaticSegments(starts, tuple(capacities)), -(-int(ends[-1]) // block) * block


def _padding(capacities: Sequence[int], align: int) -> float:
    """What multiples of `align` add to a pool, as a share of it."""
    return sum(-capacity % align for capacity in capacities) / max(sum(capacities), 1)


def pool_alignment(dtype, platform: str | None = None) -> int:
    """Rows that a segment's start must be a multiple of: a DMA tile, or 1 on CPUs.

    Args:
        platform: of the devices; None for the default ones'.
    """
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return 1 if on_cpu else 32 // jnp.dtype(dtype).itemsize
