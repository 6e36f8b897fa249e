"""A flat list of equal pieces of work, so that a kernel's time follows the live entries.

Segments (the slots of a sequence, the rows of a head) differ in length; a grid over (segment,
block) would spend steps on blocks beyond their ends. The list names the live blocks only, one
after the other, and a share of it is a share of the bytes, whatever the segments are. `schedule`
makes the lists of all layers of a decode step at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.combine import merge
from pallas_kernels.quantized import is_quantized
from pallas_kernels.reference import NEG_INF
from pallas_kernels.segments import Segments

COMPARED = 2**20
"""Segments times pieces up to which comparing all of them costs a TPU less than a binary search,
which is a loop (XLA's estimate: 8,400 cycles at 512 × 2048)."""


class WorkList(NamedTuple):
    """The blocks that hold live rows of U segments, in order.

    Attributes:
        bounds: [2] int32, the number of pieces, and how many of them a share has.
        owners: int32, the segment of each piece [W], or of the first piece of each share and of
            the one after the last [shares + 1]; beyond the list the last segment.
        firsts: [U] int32, number of each segment's first piece.
        starts: [U] int32, where each segment starts in the array that holds it.
        begins, ends: [U] int32, live rows of each segment, counted from its start.
    """

    bounds: Int[Array, "2"]
    owners: Int[Array, " W"]
    firsts: Int[Array, " U"]
    starts: Int[Array, " U"]
    begins: Int[Array, " U"]
    ends: Int[Array, " U"]


def flatten(
    starts: Int[Array, " U"],
    lengths: Int[Array, " U"],
    block: int,
    most: int | None = None,
    window: int | None = None,
    shares: int = 1,
) -> WorkList:
    """Blocks of `block` rows that hold live rows: Σ ceil(length / block) without a window.

    Args:
        starts, lengths: first row and number of live rows of each segment.
        most: W, the number of pieces that can occur; None: owners are those of the shares.
        window: only the last `window` live rows are seen.
        shares: the list is cut into so many shares.
    """
    begins = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    pieces = -(-lengths // block) - begins // block
    upto = jnp.cumsum(pieces, dtype=jnp.int32)
    count = upto[-1]
    per_share = jnp.maximum(-(-count // shares), 1)
    if most is None:
        numbers = jnp.arange(shares + 1, dtype=jnp.int32) * per_share
    else:
        numbers = jnp.arange(most, dtype=jnp.int32)
        # Segments beyond a wrong bound lose their last rows; no kernel reads beyond the list.
        count = jnp.minimum(count, most)
        per_share = jnp.minimum(per_share, -(-most // shares))
    method = "compare_all" if upto.shape[0] * numbers.shape[0] <= COMPARED else "scan"
    owners = jnp.searchsorted(upto, numbers, side="right", method=method).astype(jnp.int32)
    owners = jnp.minimum(owners, lengths.shape[0] - 1)
    bounds = jnp.stack([count, per_share])
    return WorkList(bounds, owners, upto - pieces, starts, begins, lengths)


def touched(work: WorkList, block: int, shares: int) -> Bool[Array, "shares U"]:
    """Which shares have pieces of which segments."""
    pieces = -(-work.ends // block) - work.begins // block
    start = jnp.arange(shares, dtype=jnp.int32)[:, None] * work.bounds[1]
    low = jnp.maximum(start, work.firsts[None])
    return low < jnp.minimum(start + work.bounds[1], (work.firsts + pieces)[None])


def combine(
    out: Float[Array, "shares U C G Y"],
    lse: Float[Array, "shares U C G"],
    work: WorkList,
    block: int,
) -> tuple[Float[Array, "U C G Y"], Float[Array, "U C G"]]:
    """Merges the shares' partial results; what a share never touched was never written."""
    written = touched(work, block, out.shape[0])[:, :, None, None]
    lse = jnp.where(written, lse, NEG_INF)
    out = jnp.where(written[..., None], out, jnp.zeros((), out.dtype))
    total = out[0], lse[0]
    for share in range(1, out.shape[0]):
        total = merge(total, (out[share], lse[share]))
    return total


def schedule(
    starts: Int[Array, "L B K"],
    lengths: Int[Array, "L B K"],
    *,
    queries_per_head: int,
    k_pool: Any,
    v_pool: Any,
    align: int = 8,
    span: int | None = None,
    implementation: str = "auto",
) -> WorkList | None:
    """The work lists of `ragged_gqa_decode` for all layers of a decode step.

    Args:
        starts, lengths: of the segments of L layers in pools of the same shape.
        queries_per_head: query heads of a KV head.
        k_pool, v_pool: [B, P, H] a layer's pools, or their shapes and dtypes.
        align, span, implementation: as in `ragged_gqa_decode`; `span` bounds every layer.

    Returns:
        Arrays whose first axis is that of the layers: `jax.tree.map(lambda x: x[layer], …)` is what
        `ragged_gqa_decode` takes as `schedule`. None where XLA serves, which needs none.

    Raises:
        NotImplementedError: the named implementation cannot serve these arguments.
    """
    (B, P, H), K = k_pool.shape, starts.shape[2]
    dtype = jnp.bfloat16 if is_quantized(k_pool.dtype) else k_pool.dtype
    q = jax.ShapeDtypeStruct((B, K * queries_per_head, H), dtype)
    shape = jax.ShapeDtypeStruct((B, K), jnp.int32)
    operands = q, k_pool, v_pool, Segments(shape, shape, align, span), None
    work_list = dispatch.scheduler(implementation, "ragged_gqa_decode", *operands)
    if work_list is None:
        return None

    def of_layer(starts: jax.Array, lengths: jax.Array) -> WorkList:
        segments = Segments(starts, lengths, align, span)
        return work_list(segments, jnp.clip(lengths, 0, segments.room(P)), queries_per_head, P)

    return jax.vmap(of_layer)(starts, lengths)
