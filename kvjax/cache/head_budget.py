"""The head-budgeted cache: every KV head has a segment of its own length in one flat pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.cache import slots
from kvjax.cache.attention import AttentionSpec, Expand, causal_attention
from pallas_kernels import ragged_gqa_decode
from pallas_kernels.ragged_blocks import BLOCK_SIZES


@flax.struct.dataclass
class HeadBudgetCache:
    """Keys and values of the tokens that each KV head keeps, and of all tokens that come later.

    Head k owns the pool's rows starts[k] … starts[k] + capacities[k]; the first
    head_lengths[b, k] of them are live, in the order of time. The layout is static, so that the
    arrays are as small as the budgets are; a new token is one write per head.

    Attributes:
        k_pool, v_pool: [B, P, ·].
        head_lengths: [B, K] int32, entries given to each head; above its capacity the surplus was
            dropped.
        lengths: [B] int32, tokens that the sequence has given in all: the next one's position.
        positions: [B, P] int32, the entries' positions, −1 for none; only layers with a sliding
            window need them, otherwise None.
        starts, capacities: K ints each, static.
    """

    k_pool: Any
    v_pool: Any
    head_lengths: Any
    lengths: Any
    positions: Any
    starts: tuple[int, ...] = flax.struct.field(pytree_node=False)
    capacities: tuple[int, ...] = flax.struct.field(pytree_node=False)

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
        """An empty cache; segments start at multiples of `align` rows.

        On accelerators `align` is the rows of a DMA tile: 8 for 4-byte entries, 16 for 2-byte and
        32 for 1-byte ones. CPUs need none.
        """
        starts, rows = segment_starts(capacities, align)
        return cls(
            k_pool=jnp.zeros((batch, rows, key_dim), dtype),
            v_pool=jnp.zeros((batch, rows, value_dim), dtype),
            head_lengths=jnp.zeros((batch, len(starts)), jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            positions=jnp.full((batch, rows), -1, jnp.int32) if keep_positions else None,
            starts=starts,
            capacities=tuple(capacities),
        )

    @property
    def capacity(self) -> jax.Array:
        """[B] tokens that a sequence can give in all: its fullest head decides."""
        room = jnp.asarray(self.capacities, jnp.int32)[None] - self.head_lengths
        return self.lengths + jnp.min(room, axis=1)

    def append(self, k: jax.Array, v: jax.Array, positions: jax.Array) -> HeadBudgetCache:
        """Stores the new entries [B, T, K, ·] where position ≥ 0, in every head."""
        steps = slots.query_slots(jnp.zeros_like(self.lengths), positions)[:, :, None]
        slot_BTK = self.head_lengths[:, None] + steps
        fits = (steps >= 0) & (slot_BTK < jnp.asarray(self.capacities, jnp.int32)[None, None])
        rows_BTK = slot_BTK + jnp.asarray(self.starts, jnp.int32)[None, None]
        rows_BTK = jnp.where(fits, rows_BTK, self.k_pool.shape[1])
        count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        with jax.named_scope("cache_update"):
            return dataclasses.replace(
                self,
                k_pool=slots.write_pool(self.k_pool, k, rows_BTK),
                v_pool=slots.write_pool(self.v_pool, v, rows_BTK),
                positions=_write_positions(self.positions, positions, rows_BTK),
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
        """See `Cache.attend`.

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
        with jax.named_scope("attend"):
            if q.shape[1] == 1:
                return cache._decode(q[:, 0], positions[:, 0], spec)[:, None], cache
            steps = slots.query_slots(jnp.zeros_like(self.lengths), positions)
            return cache._attend_many(q, self.head_lengths, steps, positions, spec), cache

    def live_heads(self) -> Int[Array, "B K"]:
        """Live rows of each segment."""
        return jnp.minimum(self.head_lengths, jnp.asarray(self.capacities, jnp.int32)[None])

    def _decode(
        self, q_BNH: jax.Array, position_B: jax.Array, spec: AttentionSpec
    ) -> Float[Array, "B N Y"]:
        live = None
        if spec.window is not None and self.positions is not None:
            live = self.positions > position_B[:, None] - spec.window
        return ragged_gqa_decode(
            q_BNH,
            self.k_pool,
            self.v_pool,
            self.starts,
            self.live_heads(),
            capacities=self.capacities,
            live=live,
            scale=spec.scale,
            softcap=spec.softcap,
        )

    def _attend_many(
        self,
        q_BTNH: jax.Array,
        old_BK: jax.Array,
        steps_BT: jax.Array,
        positions_BT: jax.Array,
        spec: AttentionSpec,
    ) -> Float[Array, "B T N Y"]:
        """Several new tokens, causal among themselves, one head's segment at a time.

        Without a window slots serve as positions: they have the order of time. With one the true
        positions are compared.
        """
        G = q_BTNH.shape[2] // len(self.starts)
        live_BK = self.live_heads()
        outs = []
        for head, (start, size) in enumerate(zip(self.starts, self.capacities, strict=True)):
            segment = slice(start, start + size)
            if self.positions is None:
                k_at = slots.live_slots(live_BK[:, head], size)
                q_at = jnp.where(steps_BT >= 0, old_BK[:, head, None] + steps_BT, -1)
            else:
                k_at, q_at = self.positions[:, segment], positions_BT
            outs.append(
                causal_attention(
                    q_BTNH[:, :, head * G : (head + 1) * G],
                    self.k_pool[:, segment, None],
                    self.v_pool[:, segment, None],
                    q_at,
                    k_at,
                    spec,
                )
            )
        return jnp.concatenate(outs, axis=2)


def segment_starts(capacities: Sequence[int], align: int) -> tuple[tuple[int, ...], int]:
    """First row of each segment, each a multiple of `align`, and the rows of the whole pool.

    The pool ends at a whole block (see `pallas_kernels.ragged_blocks`), the largest that adds
    less than a sixteenth, or the smallest.
    """
    if align < 1:
        raise ValueError(f"align is {align}, expected at least 1")
    ends = np.cumsum([-(-capacity // align) * align for capacity in capacities])
    block = next((size for size in BLOCK_SIZES if ends[-1] >= 16 * size), BLOCK_SIZES[-1])
    return (0, *(int(end) for end in ends[:-1])), -(-int(ends[-1]) // block) * block


def _write_positions(
    buffer_BP: jax.Array | None, positions_BT: jax.Array, rows_BTK: jax.Array
) -> jax.Array | None:
    if buffer_BP is None:
        return None
    new = jnp.broadcast_to(positions_BT[:, :, None], rows_BTK.shape)
    return slots.write_pool(buffer_BP[..., None], new[..., None], rows_BTK)[..., 0]


def pool_alignment(dtype) -> int:
    """Rows that a segment's start must be a multiple of: a DMA tile, or 1 on CPUs."""
    return 1 if jax.default_backend() == "cpu" else 32 // jnp.dtype(dtype).itemsize
