"""Head-ragged decode in plain jnp without a copy: the pool is one batch of equal blocks.

Slicing a pool into its heads' segments costs a copy of each, so the pool is viewed as blocks of
rows, whatever segments they belong to. A block meets the queries of every head that owns some of
its rows (two, seldom more), one batched product serves all blocks, and masks sort out the rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.reference import NEG_INF, clean_if_needed, live_rows, soft_cap

BLOCK_SIZES = (64, 32, 16, 8)


class Layout(NamedTuple):
    """How blocks and segments overlap; all static.

    Attributes:
        heads: [C, M] the heads that own rows of each of C blocks, padded with 0.
        owned: [C, M, size] bool, the rows that such a head owns.
        head_of: [K, C·M] bool, one-hot over heads, nothing for padding.
    """

    heads: np.ndarray
    owned: np.ndarray
    head_of: np.ndarray


def block_size(rows: int) -> int | None:
    """The largest block that divides the pool; None if there is none."""
    return next((size for size in BLOCK_SIZES if rows % size == 0), None)


def block_layout(starts: Sequence[int], capacities: Sequence[int], rows: int, size: int) -> Layout:
    """Which heads own rows of which block."""
    K, C = len(starts), rows // size
    owned = np.zeros((K, rows), bool)
    for head, (start, capacity) in enumerate(zip(starts, capacities, strict=True)):
        owned[head, start : start + capacity] = True
    owned = owned.reshape(K, C, size).swapaxes(0, 1)
    present = owned.any(axis=2)
    most = max(int(present.sum(axis=1).max()), 1)
    # A stable sort of "absent" brings the heads that are present to the front.
    heads = np.argsort(~present, axis=1, kind="stable")[:, :most]
    owned = np.take_along_axis(owned, heads[:, :, None], axis=1)
    there = np.take_along_axis(present, heads, axis=1)
    head_of = (heads.reshape(1, -1) == np.arange(K)[:, None]) & there.reshape(1, -1)
    return Layout(heads.astype(np.int32), owned, head_of)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    starts: Sequence[int],
    capacities: Sequence[int],
    lengths: jax.Array,
    scale: float,
    softcap: float | None,
    live_pool: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; P must be a multiple of 8. out and lse are fp32."""
    (B, N, H), (P, Y), K = q.shape, v_pool.shape[1:], len(starts)
    G, size = N // K, block_size(P)
    assert size is not None
    layout = block_layout(starts, capacities, P, size)
    C, M = layout.heads.shape
    live_BP = live_rows(starts, capacities, lengths, P)
    if live_pool is not None:
        live_BP &= live_pool
    live = live_BP.reshape(B, C, 1, 1, size) & jnp.asarray(layout.owned)[None, :, :, None]

    queries = q.reshape(B, K, G, H)[:, layout.heads.ravel()].reshape(B, C, M * G, H)
    keys = k_pool.reshape(B, C, size, H)
    logits = jnp.einsum("bcqh,bcsh->bcqs", queries, keys, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * scale, softcap).reshape(B, C, M, G, size)
    logits = jnp.where(live, logits, NEG_INF)

    top = jnp.max(logits, axis=-1).reshape(B, 1, C * M, G)
    head_of = jnp.asarray(layout.head_of)
    top = jnp.max(jnp.where(head_of[None, :, :, None], top, NEG_INF), axis=2)
    shift = top[:, layout.heads.ravel()].reshape(B, C, M, G, 1)
    weights = jnp.where(live, jnp.exp(logits - shift), 0.0)
    # A one-hot for every sequence: a product without a batch would transpose the blocks' outputs.
    one_hot = jnp.broadcast_to(head_of.astype(jnp.float32)[None], (B, K, C * M))
    total = jnp.einsum("bkx,bxg->bkg", one_hot, jnp.sum(weights, axis=-1).reshape(B, C * M, G))

    def attend(values: jax.Array) -> jax.Array:
        out = jnp.einsum(
            "bcqs,bcsy->bcqy",
            weights.reshape(B, C, M * G, size).astype(values.dtype),
            values.reshape(B, C, size, Y),
            preferred_element_type=jnp.float32,
        )
        out = jnp.einsum("bkx,bxz->bkz", one_hot, out.reshape(B, C * M, G * Y))
        return out.reshape(B, K, G, Y)

    divisor = jnp.maximum(total, 1e-30)
    out = clean_if_needed(attend, v_pool, live_BP[..., None]) / divisor[..., None]
    lse = jnp.where(total > 0, top + jnp.log(divisor), NEG_INF)
    return out.reshape(B, N, Y), lse.reshape(B, N)
