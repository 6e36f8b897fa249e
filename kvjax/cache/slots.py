"""Where new tokens go: slot arithmetic shared by the dense and the latent cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def token_slots(
    lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"], capacity: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Slots of the new tokens and the lengths after them.

    Valid tokens (position ≥ 0) take consecutive slots from the current length; padding and tokens
    beyond `capacity` get the slot `capacity`, which a scatter in mode "drop" discards.
    """
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    slots = jnp.where(valid, lengths_B[:, None] + counts - 1, capacity)
    return jnp.minimum(slots, capacity), lengths_B + counts[:, -1]


def write_rows(
    buffer: Shaped[Array, "B K S X"], new: Shaped[Array, "B T K X"], slots: Int[Array, "B T"]
) -> Shaped[Array, "B K S X"]:
    """Writes new[b, t, k] to buffer[b, k, slots[b, t]]; out-of-range slots are dropped."""
    rows = jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None]
    return buffer.at[rows, :, slots].set(new.astype(buffer.dtype), mode="drop")


def query_slots(lengths_B: Int[Array, " B"], positions_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Slot that a query's own token would take, −1 for padding; unlike `token_slots` unbounded."""
    valid = positions_BT >= 0
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, lengths_B[:, None] + counts - 1, -1)


def live_slots(lengths_B: jax.Array, capacity: int) -> Int[Array, "B S"]:
    """[B, S] slot numbers, −1 where nothing is stored."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    return jnp.where(slots < lengths_B[:, None], slots, -1)
