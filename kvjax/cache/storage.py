"""The formats of cached entries, and the writes of new ones; all caches use them.

Entries are plain arrays, 8-bit values with scales, packed 4-bit rows, or on CPUs the bits of 16-bit
floats. All are pytrees whose leaves share the leading axes: gathers and writes map over the leaves.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.api import target
from pallas_kernels.entries import (
    ENCODED,
    Bits,
    Entries,
    Packed,
    Quantized,
    empty,
    from_bits,
    is_quantized,
    quantize,
    to_bits,
)
from pallas_kernels.gpu.limits import TILE


def empty_pool(shape: tuple[int, ...], dtype: Any, platform: str | None = None) -> Entries:
    """`empty` for a pool, of which a program reads and writes a few rows at a time.

    XLA:CPU would compute 16-bit floats in float32 and convert the whole pool to float32 and back.
    On CPUs a pool therefore holds their bits.

    Args:
        platform: platform of the devices; None for the platform that programs are traced for.
    """
    return as_pool(empty(shape, dtype), platform)


def as_pool(entries: Entries, platform: str | None = None) -> Entries:
    """Entries in the format of a pool, see `empty_pool`."""
    if isinstance(entries, ENCODED) or (platform or target().platform) != "cpu":
        return entries
    return to_bits(entries) if entries.dtype in (jnp.bfloat16, jnp.float16) else entries


def cast(entries: Entries, dtype: str | None) -> Entries:
    """Entries in the given dtype; unchanged for None, and if they are quantized or bit patterns."""
    if dtype is None or isinstance(entries, ENCODED):
        return entries
    return quantize(entries, jnp.dtype(dtype)) if is_quantized(dtype) else entries.astype(dtype)


def encode(new: Entries, like: Entries) -> Entries:
    """New entries in the format of `like`; entries that are encoded already are returned as is."""
    if isinstance(new, ENCODED):
        return new
    if isinstance(like, Quantized | Packed):
        return quantize(new, like.dtype)
    new = new.astype(like.dtype)
    return to_bits(new) if isinstance(like, Bits) else new


def from_bits_everywhere(tree: Any) -> Any:
    """A pytree with floats in place of bit patterns."""
    return jax.tree.map(from_bits, tree, is_leaf=lambda leaf: isinstance(leaf, Bits))


def take_rows(entries: Entries, rows_BP: Int[Array, "B P"], live_BP: jax.Array) -> Entries:
    """[B, P, ·] the given rows of [B, R, ·] entries; zeros for rows that are not live."""

    def take(leaf: jax.Array) -> jax.Array:
        spread = (slice(None), slice(None), *(None,) * (leaf.ndim - 2))
        taken = jnp.take_along_axis(leaf, rows_BP[spread], axis=1)
        return jnp.where(live_BP[spread], taken, jnp.zeros((), leaf.dtype))

    return jax.tree.map(take, entries)


SCATTER_UPCASTS = jax.__version_info__ < (0, 11)


def slot_tile(platform: str | None = None) -> int:
    """Dense and latent caches have a multiple of this number of slots.

    The number is 8 on GPUs, whose kernels copy whole tiles, and 1 elsewhere.

    Args:
        platform: platform of the devices; None for the platform that programs are traced for.
    """
    return TILE if (platform or target().platform) in ("gpu", "cuda") else 1


def whole_slots(count: int, platform: str | None = None) -> int:
    """`count` slots rounded up to a multiple of `slot_tile`."""
    tile = slot_tile(platform)
    return -(-count // tile) * tile


def where_live(counts: Int[Array, "B *rest"], positions_B1: Int[Array, "B 1"]) -> jax.Array:
    """The counts of rows that a step reads: 0 for sequences that have ended (position −1)."""
    live = positions_B1.reshape(-1, *(1,) * (counts.ndim - 1)) >= 0
    return jnp.where(live, counts, 0)


ROOM = 64  # rows for new tokens, at least


def room_bucket(max_new_tokens: int) -> int:
    """Rows for new tokens: the smallest of 64, 128, 256, … that is large enough; 0 for 0."""
    if max_new_tokens == 0:
        return 0
    return max(ROOM, 1 << (max_new_tokens - 1).bit_length())


def token_slots(
    lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"], capacity: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Slots of the new tokens, and the lengths after them.

    Valid tokens (position ≥ 0) take consecutive slots from the current length on. Padding and
    tokens beyond `capacity` get the slot `capacity`, which a scatter in mode "drop" discards. On a
    mesh lengths count from a device's first slot and may be negative: tokens that belong before
    that slot are discarded too.
    """
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    slots = lengths_B[:, None] + counts - 1
    slots = jnp.where(valid & (slots >= 0), slots, capacity)
    return jnp.minimum(slots, capacity), lengths_B + counts[:, -1]


def write_rows(
    buffer: Entries, new: Shaped[Array, "B T K *X"], slots: Int[Array, "B T"]
) -> Entries:
    """Writes new[b, t, k] to buffer[b, k, slots[b, t]], for a buffer [B, K, S, …].

    Slots out of range are dropped.
    """

    def scatter(buffer, new, slots):
        # Index the heads too. Without that a single sequence is a scatter of one window, which XLA
        # turns into updates that copy the buffer.
        rows = jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None, None]
        heads = jnp.arange(buffer.shape[1], dtype=jnp.int32)[None, None]
        return buffer.at[rows, heads, slots[:, :, None]].set(new, mode="drop")

    def select(buffer, new, slots):
        hit = slots == jnp.arange(buffer.shape[2], dtype=jnp.int32)[None]
        rows = jnp.swapaxes(new, 1, 2)
        needed = jnp.any(slots < buffer.shape[2])
        return at_most_once(
            needed, lambda old: select_bits(hit[:, None, :, None], rows, old), buffer
        )

    return _write_in_place(scatter, select, buffer, encode(new, buffer), slots)


def write_pool(pool: Entries, new: Shaped[Array, "B T K *X"], rows: Int[Array, "B T K"]) -> Entries:
    """Writes new[b, t, k] to pool[b, rows[b, t, k]], for a pool [B, P, …].

    Rows out of range are dropped.
    """

    def scatter(pool, new, rows):
        batch = jnp.arange(pool.shape[0], dtype=jnp.int32)[:, None, None]
        return pool.at[batch, rows].set(new, mode="drop")

    def select(pool, new, rows):
        slots = jnp.arange(pool.shape[1], dtype=jnp.int32)[None]

        def write_heads(pool):
            # Head by head: one comparison for all heads would be a matrix [B, K, P].
            for head in range(new.shape[2]):
                hit = rows[:, :, head] == slots
                pool = select_bits(hit[:, :, None], new[:, :, head], pool)
            return pool

        return at_most_once(jnp.any(rows < pool.shape[1]), write_heads, pool)

    return _write_in_place(scatter, select, pool, encode(new, pool), rows)


def at_most_once(
    needed: jax.Array, write: Callable[[jax.Array], jax.Array], buffer: jax.Array
) -> jax.Array:
    """`write(buffer)` if needed, as a loop of at most one turn.

    XLA would fuse a plain select into each of its readers, and copy the buffer for them.
    """
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), lambda _, old: write(old), buffer)


def _write_in_place(scatter, select, buffer: Entries, new: Entries, slots: jax.Array) -> Entries:
    """Scatters the new entries; on CPUs one bfloat16 token is written by `select` instead.

    Before jax 0.11, XLA:CPU scatters bfloat16 in float32 and converts the whole buffer to float32
    and back. A select over the buffer runs in place, in one pass.
    """
    plain = not isinstance(buffer, jax.Array) or buffer.dtype != jnp.bfloat16
    if plain or slots.shape[1] != 1 or not SCATTER_UPCASTS:
        return jax.tree.map(lambda leaf, rows: scatter(leaf, rows, slots), buffer, new)
    return jax.lax.platform_dependent(buffer, new, slots, cpu=select, default=scatter)


def select_bits(hit: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`jnp.where` on the bits of 16-bit floats: XLA then converts nothing to float32."""
    bits = jax.lax.bitcast_convert_type
    chosen = jnp.where(hit, bits(new, jnp.uint16), bits(old, jnp.uint16))
    return bits(chosen, old.dtype)


def query_slots(lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Slot of each query's own token, −1 for padding. Unlike `token_slots` this has no bound."""
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, lengths_B[:, None] + counts - 1, -1)


def slot_numbers(lengths_B: jax.Array, capacity: int) -> Int[Array, "B S"]:
    """[B, S] the slot numbers; −1 for empty slots."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    return jnp.where(slots < lengths_B[:, None], slots, -1)


def last_queries(
    old: Float[Array, "B w N H"], q: Float[Array, "B T N H"], positions: Int[Array, "B T"]
) -> Float[Array, "B w N H"]:
    """The last w of the old and new queries together, without padding (on the right)."""
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    seen = jnp.concatenate([old, q.astype(old.dtype)], axis=1)
    # `seen` has the old queries first, so its last w valid rows start at `count`.
    last = count[:, None] + jnp.arange(old.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(seen, last[:, :, None, None], axis=1)
