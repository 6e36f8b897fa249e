"""The decode operations on several devices, under `jax.shard_map`: kernels are not partitioned.

Grouped queries split over heads, without communication. Latents have no heads: they split over
sequences of the batch, or over slots, and then partial results are merged by their logsumexp.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from pallas_kernels import api
from pallas_kernels.head_plan import HeadPlan
from pallas_kernels.quantized import Entries


def gqa_decode(
    q: jax.Array,
    k: Entries,
    v: Entries,
    lengths: jax.Array,
    *,
    mesh: Mesh,
    axis: str,
    **settings: Any,
) -> Any:
    """`pallas_kernels.gqa_decode` with the heads over a mesh axis.

    Args:
        q: [B, N, H], split over N; k, v: [B, K, S, ·], split over K; lengths: [B].
        settings: those of the operation.
    """
    heads = Spec(None, axis)
    run = partial(api.gqa_decode, **settings)
    return _map(run, mesh, (heads, heads, heads, Spec()), heads)(q, k, v, lengths)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: Entries,
    v_pool: Entries,
    plan: HeadPlan,
    lengths: jax.Array,
    *,
    mesh: Mesh,
    axis: str,
    **settings: Any,
) -> Any:
    """`pallas_kernels.ragged_gqa_decode` with heads over a mesh axis as a plan assigns them.

    Args:
        q: [B, N, H]; lengths: [B, K]; heads in the model's order.
        k_pool, v_pool: [B, D · rows, ·] as `HeadPlan.spread` lays them out, split over rows.
        settings: those of the operation, without `live`.

    Raises:
        ValueError: the plan is for another number of devices.
    """
    B, N, H = q.shape
    D, K = len(plan.heads), lengths.shape[1]
    if mesh.shape[axis] != D:
        raise ValueError(f"the plan is for {D} devices, mesh axis {axis!r} has {mesh.shape[axis]}")
    order = np.concatenate(plan.heads)
    tables = jnp.asarray(plan.starts, jnp.int32), jnp.asarray(plan.capacities, jnp.int32)

    def run(q, k_pool, v_pool, lengths, starts, capacities):
        starts, capacities = (jnp.broadcast_to(x, lengths.shape) for x in (starts, capacities))
        return api.ragged_gqa_decode(
            q,
            k_pool,
            v_pool,
            starts,
            lengths,
            capacities=capacities,
            align=plan.align,
            **settings,
        )

    split = Spec(None, axis)
    specs = (split, split, split, split, Spec(axis), Spec(axis))
    ordered = q.reshape(B, K, N // K, H)[:, order].reshape(B, N, H)
    got = _map(run, mesh, specs, split)(ordered, k_pool, v_pool, lengths[:, order], *tables)
    back = np.argsort(order)

    def in_order(x: jax.Array) -> jax.Array:
        return x.reshape(B, K, N // K, *x.shape[2:])[:, back].reshape(x.shape)

    return jax.tree.map(in_order, got)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: Entries,
    k_rope: Entries,
    lengths: jax.Array,
    scale: float,
    *,
    mesh: Mesh,
    batch_axis: str | None = None,
    slot_axis: str | None = None,
    return_lse: bool = False,
    **settings: Any,
) -> Any:
    """`pallas_kernels.mla_decode` with sequences, slots or both over mesh axes.

    Args:
        q_latent, q_rope, lengths: split over B.
        latent, k_rope: [B, S, ·], split over B and S.
        settings: those of the operation.

    Raises:
        NotImplementedError: a window over slots that are split.
    """
    if slot_axis is not None and settings.get("window") is not None:
        raise NotImplementedError("a window reaches over the slots of several devices")

    def run(q_latent, q_rope, latent, k_rope, lengths):
        if slot_axis is not None:
            slots = latent.shape[1]
            lengths = jnp.clip(lengths - jax.lax.axis_index(slot_axis) * slots, 0, slots)
        part = api.mla_decode(
            q_latent, q_rope, latent, k_rope, lengths, scale, return_lse=True, **settings
        )
        return part if slot_axis is None else merge_over(slot_axis, *part)

    rows, held = Spec(batch_axis), Spec(batch_axis, slot_axis)
    out, lse = _map(run, mesh, (rows, rows, held, held, rows), rows)(
        q_latent, q_rope, latent, k_rope, lengths
    )
    return (out, lse) if return_lse else out


def merge_over(axis: str, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results over disjoint sets of keys on the devices of a mesh axis, merged on all of them."""
    top = jax.lax.pmax(lse, axis)
    weight = jnp.exp(lse - top)
    total = jax.lax.psum(weight, axis)
    merged = jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axis) / total[..., None]
    return merged.astype(out.dtype), top + jnp.log(total)


def _map(run: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    # What a kernel returns does not say over which axes it varies.
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
