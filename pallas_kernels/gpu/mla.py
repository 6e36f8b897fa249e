"""`mla_decode` on GPUs: a segment is a sequence's latents and up to 64 of its query heads."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.attention import attend
from pallas_kernels.gpu.plan import Plan
from pallas_kernels.gpu.queries import from_groups, group_size, into_groups
from pallas_kernels.gpu.shared_memory import BLOCK, stages_that_fit
from pallas_kernels.operands import operands
from pallas_kernels.plan import flatten
from pallas_kernels.quantized import Entries


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
    shares: int,
    stages: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.mla_decode`; returns out and lse, both fp32.

    A block of latents is read once for its keys and its values. Of more than 64 heads each group of
    64 reads all latents of a sequence before the next one does: from memory again, unless these
    fit into the L2 cache.

    Args:
        shares, stages: as in `gqa_decode`.
    """
    N, R = q_rope.shape[1:]
    size, groups = group_size(N)
    parts = 1 if R == 0 else 2
    queries = tuple(into_groups(q) for q in (q_latent, q_rope)[:parts])
    x = operands(queries, (latent, k_rope)[:parts], None)
    lengths = jnp.repeat(lengths, groups)
    zeros = jnp.zeros_like(lengths)
    work = flatten(zeros, lengths, BLOCK, window=window, shares=shares)
    plan = Plan(shares, min(stages, stages_that_fit(x)), size, groups, scale, softcap)
    out, lse = (from_groups(y, N) for y in attend(x, work, plan))
    return out, lse
