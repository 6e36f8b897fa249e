"""`mla_decode` on TPUs: a block of latents is read once, as keys and as values of every head."""

import jax
import jax.numpy as jnp

from pallas_kernels.operands import operands
from pallas_kernels.plan import flatten
from pallas_kernels.quantized import Entries
from pallas_kernels.tpu.attention import attend
from pallas_kernels.tpu.blocks import Blocks


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

    Latents and rotary keys are separate arrays, each padded to whole lanes in memory anyway.

    Args:
        block: slots of a piece, a multiple of 128.
        shares: cores that share a chip's memory and each take a part of the work.
    """
    (B, N, L), S, R = q_latent.shape, latent.shape[1], q_rope.shape[2]
    blocks = Blocks(min(block, S), heads=1)
    most = B * -(-S // blocks.size)
    work = flatten(jnp.zeros_like(lengths), lengths, blocks.size, most, window, shares)
    parts = 1 if R == 0 else 2
    one_head = jax.tree.map(lambda x: x[:, None], (q_latent, q_rope, latent, k_rope))
    queries, keys = one_head[:2][:parts], one_head[2:][:parts]
    out, lse = attend(operands(queries, keys, None), work, blocks, scale, softcap, shares)
    return out.reshape(B, N, L), lse.reshape(B, N)
