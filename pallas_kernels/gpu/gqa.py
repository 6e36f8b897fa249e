"""`gqa_decode` on GPUs: a segment is a sequence's slots of one KV head."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.attention import attend
from pallas_kernels.gpu.plan import Plan
from pallas_kernels.gpu.queries import from_groups, group_size, into_groups
from pallas_kernels.gpu.shared_memory import BLOCK, stages_that_fit
from pallas_kernels.operands import operands
from pallas_kernels.plan import flatten
from pallas_kernels.quantized import Entries


def gqa_decode(
    q: jax.Array,
    k: Entries,
    v: Entries,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    shares: int,
    stages: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gqa_decode`; returns out and lse, both fp32.

    Args:
        shares: blocks of threads, as many as the device has multiprocessors.
        stages: blocks of slots under way to shared memory, fewer where they don't fit.
    """
    (B, N, H), K = q.shape, k.shape[1]
    G, (size, groups) = N // K, group_size(N // K)

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(B * K, *x.shape[2:])

    k, v = jax.tree.map(by_head, (k, v))
    x = operands((into_groups(q.reshape(B * K, G, H)),), (k,), v)
    lengths = jnp.repeat(lengths, K * groups)
    zeros = jnp.zeros_like(lengths)
    work = flatten(zeros, lengths, BLOCK, window=window, shares=shares)
    plan = Plan(shares, min(stages, stages_that_fit(x)), size, groups, scale, softcap)
    out, lse = (from_groups(y, G) for y in attend(x, work, plan))
    return out.reshape(B, N, -1), lse.reshape(B, N)
