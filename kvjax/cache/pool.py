"""The cache for head budgets: one flat pool of rows that the heads of many layers share.

`Pool` and `PoolLayer` store new tokens and attend. `lay_segments` and `copy_rows` fill a layer with
the tokens that compression keeps. `pool_rows` computes on the host how many rows a pool needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache.attention import AttentionSpec, Expand, cached_attention
from kvjax.cache.channels import KeyChannels
from kvjax.cache.storage import (
    empty_pool,
    encode,
    last_queries,
    query_slots,
    where_live,
    write_pool,
)
from pallas_kernels import ragged_gqa_decode
from pallas_kernels.entries import Newer, Segments, is_quantized
from pallas_kernels.plan import merge
from pallas_kernels.xla import attend

QUERY_TILE = 32  # queries that attend to a pool at a time
FOREVER = np.iinfo(np.int32).max // 2


@flax.struct.dataclass
class Pool:
    """Keys and values of the tokens that each head of each layer keeps, and of later tokens.

    The number of rows is part of a compiled program; which head owns which rows is data. A head
    owns a segment of consecutive rows. The segment starts with the live rows, in the order of the
    tokens; new tokens follow.

    A head may have a ring: rows at the end of its segment that new tokens overwrite in turn. Such
    a head keeps its part of the prompt and the most recent tokens, however long the text grows.

    On a mesh the rows of the first device come first, then the rows of the second, and so on. A
    segment's start counts from the first row of its device.

    Attributes:
        k, v: [B, P, ·] entries.
        starts, capacities: [B, L, K] int32, first row and number of rows of each segment.
        kept: [B, L, K] int32, number of live rows at the time when `read` tokens had been given.
        rings: [B, L, K] int32, rank of the first row of the ring; the capacity for no ring.
        lengths: [B] int32, tokens that the sequence has given; also the next token's position.
        read: [B] int32, see `kept`.
        positions: [B, P] int32 positions of the entries, −1 for none; None without a sliding
            window, which alone reads them.
        queries: for each layer [B, w, N, H], the last queries, for compression while decoding;
            None for none.
        schedule: work lists of all layers' kernels for the current step, layers first; None
            between steps and where XLA computes attention. See `kvjax.cache.layers`.
        channels: how each head's keys are normalised; None if they are not.
        align: starts are multiples of this number, as the platform's kernels require.
        span: upper bound on the rows of one layer on one device.
    """

    k: Any
    v: Any
    starts: Any
    capacities: Any
    kept: Any
    rings: Any
    lengths: Any
    read: Any
    positions: Any = None
    queries: Any = None
    schedule: Any = None
    channels: Any = None
    align: int = flax.struct.field(pytree_node=False, default=1)
    span: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        rows: int,
        widths: tuple[int, int],
        dtype: Any,
        lengths: Int[Array, " B"],
        positions: bool = False,
        align: int = 1,
        span: int | None = None,
        platform: str | None = None,
    ) -> Pool:
        """A pool of `rows` rows without segments.

        Args:
            shape: (B, L, K) of the tables.
            widths: numbers of a key and of a value.
            positions: whether a layer has a sliding window.
            platform: platform of the devices; None for the platform that programs are traced for.
        """
        B, nothing = shape[0], jnp.zeros(shape, jnp.int32)
        return cls(
            empty_pool((B, rows, widths[0]), dtype, platform),
            empty_pool((B, rows, widths[1]), dtype, platform),
            *(nothing, nothing, nothing, nothing),
            lengths=lengths,
            read=lengths,
            positions=jnp.full((B, rows), -1, jnp.int32) if positions else None,
            channels=KeyChannels.empty((*shape, widths[0])) if is_quantized(dtype) else None,
            align=align,
            span=span,
        )

    @property
    def capacity(self) -> jax.Array:
        """[B] tokens that a sequence can give in total; the fullest head without a ring decides."""
        room = self.capacities - self.kept
        room = jnp.where(self.rings < self.capacities, FOREVER, room)
        return self.read + jnp.min(room, axis=(1, 2))

    def layer(self, row: Any) -> PoolLayer:
        """The view of one layer; `row` is its row in the tables."""
        queries = None if self.queries is None else self.queries[row]
        # Queries of other layers would only be more arguments of this layer's program.
        bare = self if self.queries is None else dataclasses.replace(self, queries=None)
        return PoolLayer(bare, np.int32(row) if isinstance(row, int) else row, queries)

    def with_layer(self, row: int, layer: PoolLayer) -> Pool:
        """The pool with one layer's new entries."""
        if self.queries is None:
            return layer.pool
        queries = (*self.queries[:row], layer.queries, *self.queries[row + 1 :])
        return dataclasses.replace(layer.pool, queries=queries)


@flax.struct.dataclass
class PoolLayer:
    """One layer of a `Pool`, as attention sees it. The pool counts a step's tokens after all layers
    have stored them (`ModelCache.advance`).

    Attributes:
        pool: the pool of all layers, without queries.
        row: [] int32, the layer's row in the tables.
        queries: [B, w, N, H] last queries of this layer; None for none.
    """

    pool: Pool
    row: Any
    queries: Any = None

    @property
    def lengths(self) -> jax.Array:
        return self.pool.lengths

    @property
    def capacity(self) -> jax.Array:
        return self.pool.capacity

    def table(self, name: str) -> Int[Array, "B K"]:
        """One of the pool's tables, for this layer."""
        return jax.lax.dynamic_index_in_dim(getattr(self.pool, name), self.row, 1, keepdims=False)

    @property
    def segments(self) -> Segments:
        """The rows of each head."""
        starts, capacities = self.table("starts"), self.table("capacities")
        return Segments(starts, capacities, self.pool.align, self.pool.span)

    @property
    def channels(self) -> KeyChannels | None:
        """How this layer's keys are normalised."""
        return None if self.pool.channels is None else self.pool.channels.layer(self.row)

    def given(self) -> Int[Array, "B K"]:
        """Entries given to each head. Those beyond its capacity overwrote older ones in the ring,
        or were dropped."""
        return self.table("kept") + (self.pool.lengths - self.pool.read)[:, None]

    def live(self, given_BK: Int[Array, "B K"]) -> Int[Array, "B K"]:
        """Live rows of each segment."""
        return jnp.minimum(given_BK, self.table("capacities"))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K X"],
        v: Float[Array, "B T K Y"],
        positions: Int[Array, "B T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "B T N Hv"], PoolLayer]:
        """See `Cache.attend`. Each of several new tokens sees all entries stored before them.

        Raises:
            NotImplementedError: keys are to be rebuilt from latents with `expand`.
            ValueError: the layer has a sliding window, but the pool was made without positions.
        """
        if expand is not None:
            raise NotImplementedError(
                "a head-budgeted cache cannot rebuild keys from latents: its heads keep different "
                "tokens, so they share no positions to rotate by"
            )
        if spec.window is not None and self.pool.positions is None:
            raise ValueError("a layer with a sliding window needs a pool with positions")
        queries = None if self.queries is None else last_queries(self.queries, q, positions)
        if (channels := self.channels) is not None:
            q, k = channels.queries(q), channels.normalised(k, axis=1)
        after = dataclasses.replace(self._append(k, v, positions), queries=queries)
        with jax.named_scope("attend"):
            if q.shape[1] == 1:
                given = self.given() + (positions >= 0).astype(jnp.int32)
                return after._decode(q[:, 0], given, positions, spec)[:, None], after
            # Read the pool as it was: a ring may already have dropped entries the first tokens see.
            return self._attend_many(q, k, v, positions, spec), after

    def _append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> PoolLayer:
        """Stores the new entries [B, T, K, ·] where position ≥ 0, in every head."""
        rows_BTK = self._new_rows(positions)
        held = self.pool.positions
        if held is not None:
            new = jnp.broadcast_to(positions[:, :, None], rows_BTK.shape)
            held = write_pool(held, new, rows_BTK)
        with jax.named_scope("cache_update"):
            pool = dataclasses.replace(
                self.pool,
                k=write_pool(self.pool.k, k, rows_BTK),
                v=write_pool(self.pool.v, v, rows_BTK),
                positions=held,
            )
        return dataclasses.replace(self, pool=pool)

    def _new_rows(self, positions_BT: jax.Array) -> Int[Array, "B T K"]:
        """Row of each new token in each head; P, which writes drop, for padding and full heads."""
        starts, capacities, first = (
            self.table(name)[:, None] for name in ("starts", "capacities", "rings")
        )
        given = self.given()[:, None]
        # `rank` is the token's place among all entries that the head has been given.
        steps = query_slots(jnp.zeros_like(self.lengths), positions_BT)[:, :, None]
        count = jnp.sum(positions_BT >= 0, axis=1, dtype=jnp.int32)[:, None, None]
        rank = given + steps
        ring = capacities - first
        # When several new tokens share a row of a ring, only the newest of them is written.
        turning = (ring > 0) & (rank >= first)
        fits = (steps >= 0) & (~turning | (rank + ring > given + count - 1))
        rank = jnp.where(turning, first + (rank - first) % jnp.maximum(ring, 1), rank)
        fits &= rank < capacities
        return jnp.where(fits, starts + rank, self.pool.k.shape[1])

    def _decode(
        self,
        q_BNH: jax.Array,
        given_BK: Int[Array, "B K"],
        positions_B1: Int[Array, "B 1"],
        spec: AttentionSpec,
    ) -> Float[Array, "B N Y"]:
        segments = self.segments
        at_row = functools.partial(
            jax.lax.dynamic_index_in_dim, index=self.row, axis=0, keepdims=False
        )
        return ragged_gqa_decode(
            q_BNH,
            self.pool.k,
            self.pool.v,
            segments.starts,
            where_live(self.live(given_BK), positions_B1),
            capacities=segments.capacities,
            align=segments.align,
            span=segments.span,
            live=self._seen(positions_B1, spec),
            schedule=jax.tree.map(at_row, self.pool.schedule),
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def _attend_many(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, spec: AttentionSpec
    ) -> Float[Array, "B T N Y"]:
        """Attention of several new tokens: to the pool, and causally among themselves."""
        B, T = positions.shape
        # Queries in tiles: the logits of all queries with all rows of the pool would not fit.
        tile = min(QUERY_TILE, T)
        tiles = -(-T // tile)
        pad = ((0, 0), (0, tiles * tile - T))
        queries = jnp.pad(q, (*pad, (0, 0), (0, 0))).reshape(B, tiles, tile, *q.shape[2:])
        at = jnp.pad(positions, pad, constant_values=-1).reshape(B, tiles, tile)
        segments, live = self.segments, self.live(self.given())

        def over_pool(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            q, at = part
            seen = self._seen(at, spec)
            pools = self.pool.k, self.pool.v
            return attend(q, *pools, segments, live, spec.scale, spec.softcap, seen)

        parts = jnp.moveaxis(queries, 1, 0), jnp.moveaxis(at, 1, 0)
        old = jax.tree.map(
            lambda x: jnp.moveaxis(x, 0, 1).reshape(B, tiles * tile, *x.shape[3:])[:, :T],
            jax.lax.map(over_pool, parts),
        )
        # Two partial results, merged by their logsumexps.
        keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        new = cached_attention(q, keys, values, positions, positions, spec)
        return merge(old, new)[0].astype(q.dtype)

    def _seen(self, positions_BT: jax.Array, spec: AttentionSpec) -> Newer | None:
        """Tells the rows inside each query's sliding window; None without a sliding window."""
        if spec.window is None:
            return None
        return Newer(self.pool.positions, positions_BT - spec.window)


def pool_alignment(dtype: Any, platform: str | None = None) -> int:
    """The number that every segment's start is a multiple of: a DMA tile, or 1 on CPUs.

    Args:
        platform: platform of the devices; None for the default backend.
    """
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return 1 if on_cpu else 32 // jnp.dtype(dtype).itemsize


BLOCK = 64  # rows that one turn of the loop in `copy_rows` copies

Rows = Callable[[jax.Array, jax.Array, jax.Array], Any]
"""Maps (sequence, head, ranks [BLOCK]) to the rows of these ranks, [BLOCK, …]."""


def lay_segments(
    pool: Pool,
    row: Any,
    held_BK: Int[Array, "B K"],
    first_B: Int[Array, " B"],
    rooms_BK: Int[Array, "B K"],
    rings_BK: Bool[Array, "B K"],
    window: int | None,
) -> Pool:
    """Writes the segments of one layer to the pool's tables, one after the other.

    Args:
        row: the layer's row in the tables.
        held_BK: number of rows that each head keeps.
        first_B: first row of the layer.
        rooms_BK: number of rows for new tokens.
        rings_BK: heads that overwrite older tokens when their room is used up.
        window: the layer's sliding window. Tokens before it are never seen again, so no segment is
            longer than the window, and the whole segment is a ring.
    """
    capacities = held_BK + rooms_BK
    if window is not None:
        capacities = jnp.minimum(capacities, window)
    # Whole multiples of `align` for every segment, so that each start is aligned as well.
    whole = -(-capacities // pool.align) * pool.align
    starts = first_B[:, None] + jnp.cumsum(whole, axis=1, dtype=jnp.int32) - whole
    ring = jnp.zeros_like(held_BK) if window is not None else held_BK
    rings = jnp.where(rings_BK, ring, capacities)

    def put(table: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(table, values.astype(jnp.int32), row, 1)

    return dataclasses.replace(
        pool,
        starts=put(pool.starts, starts),
        capacities=put(pool.capacities, capacities),
        kept=put(pool.kept, held_BK),
        rings=put(pool.rings, rings),
    )


def copy_rows(
    entries: Any, rows: Rows, starts_BK: Int[Array, "B K"], counts_BK: Int[Array, "B K"]
) -> Any:
    """Entries [B, P, …] of a pool with `counts` new rows from each start.

    Args:
        rows: makes the new rows, which are encoded like the entries.
    """
    K = counts_BK.shape[1]
    P = entries.shape[1]
    size = min(BLOCK, P)
    # One loop over the blocks of all heads. A loop over heads would take as many turns for every
    # head as for the longest.
    blocks = -(-counts_BK.reshape(-1) // size)
    upto = jnp.cumsum(blocks, dtype=jnp.int32)

    def copy(turn: jax.Array, entries: Any) -> Any:
        owner = jnp.searchsorted(upto, turn, side="right").astype(jnp.int32)
        b, k = owner // K, owner % K
        start, count = starts_BK[b, k], counts_BK[b, k]
        wanted = start + (turn - (upto[owner] - blocks[owner])) * size
        # The pool's last block starts earlier, to stay inside. `valid` protects rows of others.
        at = jnp.minimum(wanted, P - size)
        rank = at - start + jnp.arange(size, dtype=jnp.int32)
        valid = (rank >= 0) & (rank < count)
        new = encode(rows(b, k, jnp.clip(rank, 0, jnp.maximum(count - 1, 0))), entries)

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            where = (b, at, *(np.int32(0),) * (leaf.ndim - 2))
            old = jax.lax.dynamic_slice(leaf, where, (1, size, *leaf.shape[2:]))
            mask = valid.reshape(1, size, *(1,) * (leaf.ndim - 2))
            return jax.lax.dynamic_update_slice(leaf, jnp.where(mask, new[None], old), where)

        return jax.tree.map(put, entries, new)

    return jax.lax.fori_loop(0, upto[-1], copy, entries)


LARGE = 16_384
"""Pools of this many rows or more are rounded more finely, see `bucket_rows`."""
LANES = 128
BYTE_TILE = 32


class PoolRows(NamedTuple):
    """The rows of a pool on each device.

    Attributes:
        rows: rows of each device; part of a program's shape.
        first: [B, L, D] int32, first row of each layer on each device.
        span: upper bound on the rows of one layer, rounded like `rows`.
    """

    rows: int
    first: Int[np.ndarray, "B L D"]
    span: int


def bucket_rows(count: int) -> int:
    """`count` rounded up by at most 12 %, or by at most 3 % from `LARGE` on.

    Rounding leaves few sizes, and so few programs to compile: 9 … 17 times a power of two, from
    `LARGE` on 34 … 67 times a power of two.
    """
    least, step = least_steps(count), 1
    while count > 2 * least * step:
        step *= 2
    return -(-count // step) * step


def least_steps(count: int) -> int:
    """The fewest steps that `bucket_rows` makes of a count: it adds less than one step."""
    return 9 if count < LARGE else 34


def pool_rows(
    kept: Int[np.ndarray, "B L K"],
    rooms: Int[np.ndarray, "B L K"],
    limits: Int[np.ndarray, " L"],
    spare: int,
    align: int,
    devices: int,
) -> PoolRows:
    """The rows that hold all layers' segments, for the sequence that needs the most.

    Args:
        kept: upper bound on the rows that each head keeps.
        rooms: rows of each head for new tokens.
        limits: upper bound on the rows that a head of each layer can use, kept and new together.
        spare: extra rows of each layer, for heads that share their budgets.
        align: segments start at multiples of this number.
        devices: number of devices; each holds an equal share of the heads, in order.
    """
    B, L, K = kept.shape
    # Rows of each layer on each device, in whole multiples of the alignment.
    segments = np.minimum(kept + rooms, limits[:, None])
    segments = -(-segments // align) * align
    shares = segments.reshape(B, L, devices, K // devices).sum(axis=3) + -(-spare // align) * align
    first = np.cumsum(shares, axis=1) - shares
    # Room for new tokens was rounded by `room_bucket` already: round only the other rows.
    growing = np.where(kept + rooms <= limits[:, None], rooms, 0).min(axis=0)
    growing = growing.reshape(L, devices, -1).sum(axis=2)
    fixed = int(growing.sum(axis=0).min())
    rows = bucket_rows(int(shares.sum(axis=1).max()) - fixed) + fixed
    span = bucket_rows(int(shares.max()))
    # TPUs read the scales of 8-bit entries in whole lanes, and copy scales that end inside a lane.
    tile = LANES if align == BYTE_TILE else align
    rows, span = (max(-(-count // tile) * tile, tile) for count in (rows, span))
    return PoolRows(rows, first.astype(np.int32), min(span, rows))
