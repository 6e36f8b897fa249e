"""`ragged_gqa_decode` on GPUs: a segment is one head's rows of a pool."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.attention import attend
from pallas_kernels.gpu.plan import Plan
from pallas_kernels.gpu.queries import from_groups, group_size, into_groups
from pallas_kernels.gpu.shared_memory import BLOCK, stages_that_fit
from pallas_kernels.operands import operands
from pallas_kernels.plan import WorkList, flatten
from pallas_kernels.quantized import Entries
from pallas_kernels.segments import Segments


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
    shares: int,
    stages: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; returns out and lse, both fp32.

    Segments start, and the pool ends, at multiples of 8 rows (`limits.starts`).

    Args:
        work: what `work_list` makes; None: it is made here.
        shares, stages: as in `gqa_decode`.
    """
    (B, N, H), K = q.shape, segments.num_heads
    G, (size, groups) = N // K, group_size(N // K)
    seen = None if live is None else live.astype(jnp.float32)
    x = operands((into_groups(q.reshape(B * K, G, H)),), (k_pool,), v_pool, seen)
    if work is None:
        work = work_list(segments, lengths, G, k_pool.shape[1], shares=shares, stages=stages)
    plan = Plan(shares, min(stages, stages_that_fit(x)), size, K * groups, scale, softcap)
    out, lse = (from_groups(y, G) for y in attend(x, work, plan))
    return out.reshape(B, N, -1), lse.reshape(B, N)


def work_list(
    segments: Segments,
    lengths: jax.Array,
    queries_per_head: int,
    pool_rows: int,
    *,
    shares: int,
    stages: int,
) -> WorkList:
    """The pieces of B pools, once for each group of query heads."""
    _, groups = group_size(queries_per_head)
    starts, lengths = (jnp.repeat(y.reshape(-1), groups) for y in (segments.starts, lengths))
    return flatten(starts, lengths, BLOCK, shares=shares)
