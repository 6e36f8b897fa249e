"""Where new tokens go: slot arithmetic and in-place writes, shared by all caches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from kvjax.cache.entries import encode
from pallas_kernels.dispatch import target
from pallas_kernels.gpu.limits import TILE
from pallas_kernels.quantized import Entries

SCATTER_UPCASTS = jax.__version_info__ < (0, 11)


def slot_tile(platform: str | None = None) -> int:
    """Slots of a dense or latent cache come in multiples of it: 8 on GPUs, whose kernels copy
    whole tiles, and 1 elsewhere.

    Args:
        platform: of the devices; None for those that programs are traced for.
    """
    return TILE if (platform or target().platform) in ("gpu", "cuda") else 1


def whole_slots(count: int, platform: str | None = None) -> int:
    """The smallest multiple of `slot_tile` that holds `count` tokens."""
    tile = slot_tile(platform)
    return -(-count // tile) * tile


def token_slots(
    lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"], capacity: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Slots of the new tokens and the lengths after them.

    Valid tokens (position ≥ 0) take consecutive slots from the current length; padding and tokens
    beyond `capacity` get the slot `capacity`, which a scatter in mode "drop" discards. So do those
    before slot 0, where a device holds later slots of a sequence and lengths may be negative.
    """
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    slots = lengths_B[:, None] + counts - 1
    slots = jnp.where(valid & (slots >= 0), slots, capacity)
    return jnp.minimum(slots, capacity), lengths_B + counts[:, -1]


def write_rows(
    buffer: Entries, new: Shaped[Array, "B T K *X"], slots: Int[Array, "B T"]
) -> Entries:
    """Writes new[b, t, k] to buffer[b, k, slots[b, t]]; out-of-range slots are dropped.

    `buffer` is [B, K, S, …].
    """

    def scatter(buffer, new, slots):
        # An index for every head too: XLA turns a scatter of one window, which a single sequence
        # would be, into updates that copy the buffer.
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
    """Writes new[b, t, k] to pool[b, rows[b, t, k]]; out-of-range rows are dropped.

    `pool` is [B, P, …].
    """

    def scatter(pool, new, rows):
        batch = jnp.arange(pool.shape[0], dtype=jnp.int32)[:, None, None]
        return pool.at[batch, rows].set(new, mode="drop")

    def select(pool, new, rows):
        slots = jnp.arange(pool.shape[1], dtype=jnp.int32)[None]

        def write_heads(pool):
            for head in range(new.shape[2]):
                hit = rows[:, :, head] == slots
                pool = select_bits(hit[:, :, None], new[:, :, head], pool)
            return pool

        return at_most_once(jnp.any(rows < pool.shape[1]), write_heads, pool)

    return _write_in_place(scatter, select, pool, encode(new, pool), rows)


def at_most_once(
    needed: jax.Array, write: Callable[[jax.Array], jax.Array], buffer: jax.Array
) -> jax.Array:
    """write(buffer) if it is needed, in a loop of at most one turn.

    XLA would fuse a bare select into each of its readers and copy the buffer for them.
    """
    return jax.lax.fori_loop(0, needed.astype(jnp.int32), lambda _, old: write(old), buffer)


def _write_in_place(scatter, select, buffer: Entries, new: Entries, slots: jax.Array) -> Entries:
    """Scatters; one token into bfloat16 on a CPU is written by `select` instead.

    Before jax 0.11, XLA:CPU scatters bfloat16 in float32: it converts the whole buffer, there and
    back. A select that covers the buffer is in place and one pass.
    """
    plain = not isinstance(buffer, jax.Array) or buffer.dtype != jnp.bfloat16
    if plain or slots.shape[1] != 1 or not SCATTER_UPCASTS:
        return jax.tree.map(lambda leaf, rows: scatter(leaf, rows, slots), buffer, new)
    return jax.lax.platform_dependent(buffer, new, slots, cpu=select, default=scatter)


def select_bits(hit: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`jnp.where` on the bits of 16-bit floats, so that nothing is converted."""
    bits = jax.lax.bitcast_convert_type
    chosen = jnp.where(hit, bits(new, jnp.uint16), bits(old, jnp.uint16))
    return bits(chosen, old.dtype)


def query_slots(lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Slot that a query's own token would take, −1 for padding; unlike `token_slots` unbounded."""
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, lengths_B[:, None] + counts - 1, -1)


def live_slots(lengths_B: jax.Array, capacity: int) -> Int[Array, "B S"]:
    """[B, S] slot numbers, −1 where nothing is stored."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    return jnp.where(slots < lengths_B[:, None], slots, -1)
