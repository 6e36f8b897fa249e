"""The three decode operations on TPUs: how each cuts its cache into pieces for the kernel.

A segment of the work list is the slots of a sequence for one or several KV heads (`gqa_decode`),
one head's rows of a pool (`ragged_gqa_decode`), or a sequence's latents (`mla_decode`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.entries import Entries, Newer, Segments
from pallas_kernels.plan import Operands, WorkList, flatten
from pallas_kernels.tpu.kernel import Blocks, PoolBlocks, attend
from pallas_kernels.tpu.limits import block_size, dense_tiles, tile_rows


def gqa_decode(
    q: jax.Array,
    k: Entries,
    v: Entries,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    block: int,
    piece_bytes: int,
    shares: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gqa_decode`; returns out in q's dtype or fp32, and lse.

    Args:
        block: slots of a piece, a multiple of 128.
        piece_bytes: a piece reads as many KV heads as fit into this size, so that the fixed cost
            of a grid step is spread over more bytes.
        shares: cores that have a chip's memory in common; each takes an equal share of the list.
    """
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    size, heads = dense_tiles(k, v, block, piece_bytes)
    blocks = Blocks(size, heads)

    def grouped(x: jax.Array) -> jax.Array:
        """[B, K, …] to [U, heads, …]."""
        return x.reshape(B * K // heads, heads, *x.shape[2:])

    k, v = jax.tree.map(grouped, (k, v))
    lengths = jnp.repeat(lengths, K // heads)
    most = lengths.shape[0] * -(-S // size)
    work = flatten(jnp.zeros_like(lengths), lengths, size, most, window, shares)
    x = Operands.of((grouped(q.reshape(B, K, N // K, H)),), (k,), v)
    out, lse = attend(x, work, blocks, scale, softcap, shares)
    return out.reshape(B, N, -1), lse.reshape(B, N)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: Entries,
    v_pool: Entries,
    segments: Segments,
    lengths: jax.Array,
    scale: float,
    softcap: float | None,
    live: Newer | None,
    work: WorkList | None,
    *,
    block: int,
    shares: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; returns out in q's dtype or fp32, and lse.

    Segments start, and the pool ends, at whole DMA tiles (`limits.starts`).

    Args:
        work: what `ragged_work_list` returns; None: it is made here.
        block: rows of a piece, a multiple of 128.
        shares: as in `gqa_decode`.
    """
    (B, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    size = block_size(P, block)
    align = max(tile_rows(k_pool.dtype), tile_rows(v_pool.dtype))
    blocks = PoolBlocks(size, heads=1, segments=K, pool_rows=P, align=align)

    def one_head(x: jax.Array) -> jax.Array:
        """[B, P, …] to [B, 1, P, …]; numbers of rows [B, P] are padded for `row_spec`."""
        # Pools whose rows are a multiple of 128 need no padding, which would copy the array.
        pad = blocks.padded_rows() - P if x.ndim == 2 else 0
        return jnp.pad(x[:, None], [(0, 0), (0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)])

    k_pool, v_pool = jax.tree.map(one_head, (k_pool, v_pool))
    if live is not None:
        live = Newer(one_head(live.positions), live.than[:, 0])
    x = Operands.of((q.reshape(B * K, 1, N // K, H),), (k_pool,), v_pool, live)
    if work is None:
        work = ragged_work_list(segments, lengths, N // K, P, block=block, shares=shares)
    out, lse = attend(x, work, blocks, scale, softcap, shares)
    return out.reshape(B, N, -1), lse.reshape(B, N)


def ragged_work_list(
    segments: Segments,
    lengths: jax.Array,
    queries_per_head: int,
    pool_rows: int,
    *,
    block: int,
    shares: int,
) -> WorkList:
    """The work list of B pools: Σ ceil(length / block) pieces."""
    size = block_size(pool_rows, block)
    most = max(lengths.shape[0] * segments.most_blocks(pool_rows, size), 1)
    starts, lengths = segments.starts.reshape(-1), lengths.reshape(-1)
    return flatten(starts, lengths, size, most, shares=shares)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: Entries,
    k_rope: Entries,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    block: int,
    shares: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.mla_decode`; returns out in q_latent's dtype or fp32, and lse.

    A block of latents is read once, as keys and as values of every head. Latents and rotary keys
    stay separate arrays: joined they would need as much memory, since TPUs pad rows to 128 lanes.

    Args:
        block: slots of a piece, a multiple of 128.
        shares: as in `gqa_decode`.
    """
    (B, N, L), S, R = q_latent.shape, latent.shape[1], q_rope.shape[2]
    blocks = Blocks(min(block, S), heads=1)
    most = B * -(-S // blocks.size)
    work = flatten(jnp.zeros_like(lengths), lengths, blocks.size, most, window, shares)
    parts = 1 if R == 0 else 2  # one product without rotary dimensions
    one_head = jax.tree.map(lambda x: x[:, None], (q_latent, q_rope, latent, k_rope))
    queries, keys = one_head[:2][:parts], one_head[2:][:parts]
    out, lse = attend(Operands.of(queries, keys, None), work, blocks, scale, softcap, shares)
    return out.reshape(B, N, L), lse.reshape(B, N)
