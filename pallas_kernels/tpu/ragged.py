"""`ragged_gqa_decode` on TPUs: a piece is one block of one head's segment of a pool."""

import jax
import jax.numpy as jnp

from pallas_kernels.operands import operands
from pallas_kernels.plan import WorkList, flatten
from pallas_kernels.quantized import Entries
from pallas_kernels.segments import Segments
from pallas_kernels.tpu.attention import attend
from pallas_kernels.tpu.blocks import PoolBlocks
from pallas_kernels.tpu.memory import tile_rows
from pallas_kernels.tpu.tiles import block_size


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: Entries,
    v_pool: Entries,
    segments: Segments,
    lengths: jax.Array,
    scale: float,
    softcap: float | None,
    live: jax.Array | None,
    work: WorkList | None,
    *,
    block: int,
    shares: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; returns out in q's dtype or fp32, and lse.

    Segments start, and the pool ends, at whole DMA tiles (`limits.starts`).

    Args:
        work: what `work_list` makes; None: it is made here.
        block: rows of a piece, a multiple of 128.
        shares: cores that share a chip's memory and each take a part of the work.
    """
    (B, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    size = block_size(P, block)
    align = max(tile_rows(k_pool.dtype), tile_rows(v_pool.dtype))
    blocks = PoolBlocks(size, heads=1, segments=K, pool_rows=P, align=align)

    def one_head(x: jax.Array) -> jax.Array:
        """[B, P, …] to [B, 1, P, …]; what belongs to rows is padded as `read_rows` needs it."""
        pad = blocks.padded_rows() - P if x.ndim == 2 else 0
        return jnp.pad(x[:, None], [(0, 0), (0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)])

    k_pool, v_pool = jax.tree.map(one_head, (k_pool, v_pool))
    seen = None if live is None else one_head(live.astype(jnp.float32))
    x = operands((q.reshape(B * K, 1, N // K, H),), (k_pool,), v_pool, seen)
    if work is None:
        work = work_list(segments, lengths, N // K, P, block=block, shares=shares)
    out, lse = attend(x, work, blocks, scale, softcap, shares)
    return out.reshape(B, N, -1), lse.reshape(B, N)


def work_list(
    segments: Segments,
    lengths: jax.Array,
    queries_per_head: int,
    pool_rows: int,
    *,
    block: int,
    shares: int,
) -> WorkList:
    """The pieces of B pools: Σ ceil(length / size) of them."""
    size = block_size(pool_rows, block)
    most = max(lengths.shape[0] * segments.most_blocks(pool_rows, size), 1)
    starts, lengths = segments.starts.reshape(-1), lengths.reshape(-1)
    return flatten(starts, lengths, size, most, shares=shares)
