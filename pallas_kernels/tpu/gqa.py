"""`gqa_decode` on TPUs: a piece is one block of slots of a sequence, for several KV heads."""

import jax
import jax.numpy as jnp

from pallas_kernels.operands import operands
from pallas_kernels.plan import flatten
from pallas_kernels.quantized import Entries
from pallas_kernels.tpu.attention import attend
from pallas_kernels.tpu.blocks import Blocks
from pallas_kernels.tpu.tiles import dense_tiles


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
        piece_bytes: a piece takes as many KV heads as bring its entries up to this size.
        shares: cores that share a chip's memory and each take a part of the work.
    """
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    size, heads = dense_tiles(k, v, block, piece_bytes)
    blocks = Blocks(size, heads)

    def split(x: jax.Array) -> jax.Array:
        """[B, K, …] to [U, heads, …]."""
        return x.reshape(B * K // heads, heads, *x.shape[2:])

    k, v = jax.tree.map(split, (k, v))
    lengths = jnp.repeat(lengths, K // heads)
    most = lengths.shape[0] * -(-S // size)
    work = flatten(jnp.zeros_like(lengths), lengths, size, most, window, shares)
    x = operands((split(q.reshape(B, K, N // K, H)),), (k,), v)
    out, lse = attend(x, work, blocks, scale, softcap, shares)
    return out.reshape(B, N, -1), lse.reshape(B, N)
