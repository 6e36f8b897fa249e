"""Partial results of the shares, merged by segment."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gpu.plan import BLOCK, Plan
from pallas_kernels.plan import WorkList
from pallas_kernels.reference import NEG_INF


def merge_slots(
    out: Float[Array, "slots R Y"], sums: Float[Array, "2 slots R"], work: WorkList, plan: Plan
) -> tuple[Float[Array, "U G Y"], Float[Array, "U G"]]:
    """The result of share s and segment u lies in slot s + u, if u has pieces in s.

    No two results share a slot: from one to the next of the list s grows, or u, or both.

    Args:
        out: sums of weights · values.
        sums: the largest logit in units of log 2, and the sum of the weights.

    Returns:
        out [U, group, Y] and lse [U, group], fp32.
    """
    U, slots = work.ends.shape[0], out.shape[0]
    pieces = -(-work.ends // BLOCK) - work.begins // BLOCK
    segment = jnp.arange(U, dtype=jnp.int32)
    first = segment + work.firsts // work.bounds[1]
    last = jnp.where(pieces > 0, segment + (work.firsts + pieces - 1) // work.bounds[1], -1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    inside = (first[:, None] <= slot[None]) & (slot[None] <= last[:, None])
    owner = jnp.max(jnp.where(inside, segment[:, None], -1), axis=0)
    written = owner >= 0
    group = slice(0, plan.group)
    out = jnp.where(written[:, None, None], out[:, group], 0.0)
    top = jnp.where(written[:, None], sums[0, :, group], NEG_INF)
    total = jnp.where(written[:, None], sums[1, :, group], 0.0)

    owner = jnp.where(written, owner, U)
    highest = jnp.maximum(jax.ops.segment_max(top, owner, U), NEG_INF)
    share = jnp.exp2(top - jnp.take(highest, jnp.minimum(owner, U - 1), axis=0))
    share = jnp.where(written[:, None], share, 0.0)
    total = jax.ops.segment_sum(total * share, owner, U)
    divisor = jnp.maximum(total, 1e-30)
    out = jax.ops.segment_sum(out * share[..., None], owner, U) / divisor[..., None]
    lse = jnp.where(total > 0, (highest + jnp.log2(divisor)) * math.log(2), NEG_INF)
    return out, lse
