"""The three decode operations on GPUs: each as segments of rows that groups of queries read.

A segment of the work list is what one group of at most 64 queries reads: the slots of one KV head
of a sequence (`gqa_decode`), one head's rows of a pool (`ragged_gqa_decode`), or a sequence's
latents (`mla_decode`). More than 64 queries of the same rows make several segments.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.entries import Entries, Newer, Segments
from pallas_kernels.gpu.kernel import attend
from pallas_kernels.gpu.limits import BLOCK, ROWS, TILE, stages_that_fit
from pallas_kernels.gpu.scratch import Settings
from pallas_kernels.plan import Operands, WorkList, flatten


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
        shares: thread blocks, as many as the device has multiprocessors.
        stages: blocks that the ring in shared memory holds; fewer where they do not fit.
    """
    (B, N, H), K = q.shape, k.shape[1]
    G, (size, groups) = N // K, group_size(N // K)

    def by_head(x: jax.Array) -> jax.Array:
        """[B, K, …] to [B · K, …]."""
        return x.reshape(B * K, *x.shape[2:])

    k, v = jax.tree.map(by_head, (k, v))
    x = Operands.of((into_groups(q.reshape(B * K, G, H)),), (k,), v)
    lengths = jnp.repeat(lengths, K * groups)
    zeros = jnp.zeros_like(lengths)
    work = flatten(zeros, lengths, BLOCK, window=window, shares=shares)
    settings = Settings(shares, min(stages, stages_that_fit(x)), size, groups, scale, softcap)
    out, lse = (from_groups(y, G) for y in attend(x, work, settings))
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
    shares: int,
    stages: int,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; returns out and lse, both fp32.

    Segments start, and the pool ends, at multiples of 8 rows (`limits.starts`).

    Args:
        work: what `ragged_work_list` returns; None: it is made here.
        shares, stages: as in `gqa_decode`.
    """
    (B, N, H), K = q.shape, segments.num_heads
    G, (size, groups) = N // K, group_size(N // K)
    if live is not None:
        live = Newer(live.positions, live.than[:, 0])
    x = Operands.of((into_groups(q.reshape(B * K, G, H)),), (k_pool,), v_pool, live)
    if work is None:
        work = ragged_work_list(segments, lengths, G, k_pool.shape[1], shares=shares, stages=stages)
    settings = Settings(shares, min(stages, stages_that_fit(x)), size, K * groups, scale, softcap)
    out, lse = (from_groups(y, G) for y in attend(x, work, settings))
    return out.reshape(B, N, -1), lse.reshape(B, N)


def ragged_work_list(
    segments: Segments,
    lengths: jax.Array,
    queries_per_head: int,
    pool_rows: int,
    *,
    shares: int,
    stages: int,
) -> WorkList:
    """The work list of B pools: each segment once for each group of its query heads."""
    _, groups = group_size(queries_per_head)
    starts, lengths = (jnp.repeat(y.reshape(-1), groups) for y in (segments.starts, lengths))
    return flatten(starts, lengths, BLOCK, shares=shares)


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

    A block of latents is read once, as keys and as values. With more than 64 heads, each group of
    64 reads all latents of a sequence: from memory again, unless the L2 cache still has them.

    Args:
        shares, stages: as in `gqa_decode`.
    """
    N, R = q_rope.shape[1:]
    size, groups = group_size(N)
    parts = 1 if R == 0 else 2  # one product without rotary dimensions
    queries = tuple(into_groups(q) for q in (q_latent, q_rope)[:parts])
    x = Operands.of(queries, (latent, k_rope)[:parts], None)
    lengths = jnp.repeat(lengths, groups)
    zeros = jnp.zeros_like(lengths)
    work = flatten(zeros, lengths, BLOCK, window=window, shares=shares)
    settings = Settings(shares, min(stages, stages_that_fit(x)), size, groups, scale, softcap)
    out, lse = (from_groups(y, N) for y in attend(x, work, settings))
    return out, lse


def group_size(queries: int) -> tuple[int, int]:
    """Queries in a group, a multiple of 8 up to 64, and the number of groups for all of them."""
    groups = -(-queries // ROWS)
    return min(-(-queries // TILE) * TILE, ROWS), groups


def into_groups(q: Float[Array, "Z G X"]) -> Float[Array, "rows X"]:
    """Queries as the kernel reads them: [Z · groups · size, X], padded with zeros."""
    (Z, G, X), (size, groups) = q.shape, group_size(q.shape[1])
    rows = jnp.pad(q, ((0, 0), (0, size * groups - G), (0, 0))).reshape(-1, X)
    # A copy of 64 rows needs an array of at least 64. Rows past the array's end arrive as 0.
    return jnp.pad(rows, ((0, max(ROWS - Z * groups * size, 0)), (0, 0)))


def from_groups(x: jax.Array, queries: int) -> jax.Array:
    """[Z · groups, size, …] back to [Z, G, …]."""
    _, groups = group_size(queries)
    whole = x.reshape(x.shape[0] // groups, groups * x.shape[1], *x.shape[2:])
    return whole[:, :queries]
