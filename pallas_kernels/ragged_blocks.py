"""Head-ragged attention in plain jnp without a copy: the pool is one batch of equal blocks.

Slicing a pool into its heads' segments costs a copy of each, so the pool is viewed as blocks of
rows, whatever segments they belong to. A block meets the queries of every head that owns some of
its rows (two, seldom more), one batched product serves all blocks, and masks sort out the rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantized import Entries, Quantized, plain
from pallas_kernels.reference import NEG_INF, clean_if_needed, soft_cap
from pallas_kernels.segments import Segments, TracedSegments


def attend(
    q: Float[Array, "B T N H"],
    k_pool: Entries,
    v_pool: Entries,
    segments: Segments,
    lengths: Int[Array, "B K"],
    scale: float,
    softcap: float | None,
    live: Bool[Array, "B T P"] | Bool[Array, "B 1 P"] | None = None,
) -> tuple[Float[Array, "B T N Y"], Float[Array, "B T N"]]:
    """T queries over the first lengths[b, k] rows of each segment; see `ragged_gqa_decode`.

    The pool's rows must be a multiple of `segments.block_size`.

    Args:
        live: rows that each query may see besides; default all.

    Returns:
        out and lse, fp32.
    """
    if isinstance(segments, TracedSegments) and segments.span is not None:
        first, cut = segments.window(k_pool.shape[1])
        window = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=segments.span)
        k_pool, v_pool = jax.tree.map(lambda leaf: window(leaf, axis=1), (k_pool, v_pool))
        live = None if live is None else window(live, axis=2)
        segments = cut
    (B, T, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    G, size = N // K, segments.block_size(P)
    assert size is not None
    heads = segments.block_heads(P)
    C, M = heads.shape[1:]
    heads = jnp.broadcast_to(heads.reshape(-1, C * M), (B, C * M))

    def of_blocks(x: jax.Array) -> jax.Array:
        """[B, K, …] to [B, C, M, …]: what belongs to the heads of each block."""
        index = heads.reshape(B, C * M, *(1,) * (x.ndim - 2))
        found = jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")
        return found.reshape(B, C, M, *x.shape[2:])

    starts, capacities = (jnp.broadcast_to(x, (B, K)) for x in segments.arrays())
    row = jnp.arange(P, dtype=jnp.int32).reshape(1, C, 1, size)
    rank = row - of_blocks(starts)[..., None]
    owned = (rank >= 0) & (rank < of_blocks(jnp.minimum(lengths, capacities))[..., None])
    live_BP = jnp.any(owned, axis=2).reshape(B, P)
    seen = owned[:, :, :, None, None]  # [B, C, M, T, 1, size]
    if live is not None:
        seen = seen & jnp.moveaxis(live.reshape(B, -1, C, size), 1, 2)[:, :, None, :, None]

    queries = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 2)
    queries = of_blocks(queries).reshape(B, C, M * T * G, H)
    keys = plain(k_pool, q.dtype).reshape(B, C, size, H)
    logits = _products(queries, keys)
    if isinstance(k_pool, Quantized):
        logits = logits * k_pool.scale.reshape(B, C, 1, size)
    logits = soft_cap(logits * scale, softcap).reshape(B, C, M, T, G, size)
    logits = jnp.where(seen, logits, NEG_INF)

    of_head = heads[:, None] == jnp.arange(K, dtype=jnp.int32)[None, :, None]
    top = jnp.max(logits, axis=-1).reshape(B, 1, C * M, T * G)
    top = jnp.max(jnp.where(of_head[..., None], top, NEG_INF), axis=2)
    # Above every masked logit, so that those have weight 0 where no row is live as well.
    shift = of_blocks(jnp.maximum(top, NEG_INF / 2)).reshape(B, C, M, T, G, 1)
    weights = jnp.exp(logits - shift)
    # A one-hot for every sequence: a product without a batch would transpose the blocks' outputs.
    one_hot = of_head.astype(jnp.float32)
    # Blocks first: XLA:CPU takes twice as long to reduce the many short rows of weights.
    sums = jnp.einsum("bkx,bxz->bkz", one_hot, weights.reshape(B, C * M, -1))
    total = jnp.sum(sums.reshape(B, K, T * G, size), axis=-1)
    weights = weights.reshape(B, C, M * T * G, size)
    if isinstance(v_pool, Quantized):
        weights = weights * jnp.where(live_BP, v_pool.scale, 0.0).reshape(B, C, 1, size)
    values = plain(v_pool, q.dtype)
    weights = weights.astype(values.dtype)

    def weigh(values: jax.Array) -> jax.Array:
        values = values.reshape(B, C, size, -1)
        out = jnp.einsum("bcqs,bcsy->bcqy", weights, values, preferred_element_type=jnp.float32)
        return jnp.einsum("bkx,bxz->bkz", one_hot, out.reshape(B, C * M, -1))

    out = clean_if_needed(weigh, values, live_BP[..., None])
    divisor = jnp.maximum(total, 1e-30)
    out = out.reshape(B, K, T * G, -1) / divisor[..., None]
    lse = jnp.where(total > 0, top + jnp.log(divisor), NEG_INF)

    def by_query(x: jax.Array) -> jax.Array:
        """[B, K, T·G, …] to [B, T, N, …]."""
        return jnp.moveaxis(x.reshape(B, K, T, G, *x.shape[3:]), 1, 2).reshape(
            B, T, N, *x.shape[3:]
        )

    return by_query(out), by_query(lse)


def _products(queries: Float[Array, "B C Q H"], keys: Float[Array, "B C S H"]) -> jax.Array:
    """Logits of each block's queries and keys, [B, C, Q, S] fp32.

    Which order of the operands XLA:CPU is fast at depends on their dtype, up to a factor of two.
    """
    if keys.dtype != jnp.float32:
        return jnp.einsum("bcqh,bcsh->bcqs", queries, keys, preferred_element_type=jnp.float32)
    # Keys on the left, and a barrier against their exchange: XLA:CPU packs a transposed right side
    # in fp32 into a copy of its own, which costs several times the product.
    logits = jnp.einsum("bcsh,bcqh->bcsq", keys, queries)
    return jnp.swapaxes(jax.lax.optimization_barrier(logits), 2, 3)
