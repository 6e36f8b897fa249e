"""Decode attention in plain jnp: the oracle of the kernels' tests, and the "xla" implementation.

Logits, softmax and accumulators are fp32 whatever the entries' dtype. Slots that are not live are
replaced before they are used, so that whatever they hold (NaN too) never reaches the output.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

NEG_INF = -1e30  # finite, so that a row without live slots gives 0 and not NaN


def softmax_attend(
    logits_BKGS: jax.Array, v_BKSH: jax.Array, live_BKS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the live slots, then the weighted sum of the values.

    Args:
        logits_BKGS: [B, K, G, S] fp32, G queries that read the same KV head.

    Returns:
        out [B, K, G, Hv] fp32 and lse [B, K, G] fp32, −1e30 where no slot is live.
    """
    weights, total, lse = masked_softmax(logits_BKGS, live_BKS)
    out = clean_if_needed(lambda v: weighted_values(weights, v), v_BKSH, live_BKS[..., None])
    return out / total[..., None], lse


def masked_softmax(
    logits_BKGS: jax.Array, live_BKS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax weights before the division, what to divide by [B, K, G], and the lse [B, K, G]."""
    live = live_BKS[:, :, None, :]
    logits = jnp.where(live, logits_BKGS, NEG_INF)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=NEG_INF)
    weights = jnp.where(live, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1)
    divisor = jnp.maximum(total, 1e-30)
    lse = jnp.where(total > 0, top[..., 0] + jnp.log(divisor), NEG_INF)
    return weights, divisor, lse


def weighted_values(weights_BKGS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    """Σ_s weights · v, [B, K, G, Hv] fp32."""
    weights = weights_BKGS.astype(v_BKSH.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, v_BKSH, preferred_element_type=jnp.float32)


def clean_if_needed(
    attend: Callable[[jax.Array], jax.Array], v: jax.Array, live: jax.Array
) -> jax.Array:
    """attend(v), where values that are not live have weight 0.

    0 · NaN is NaN, so dead values that are not finite must be replaced. That costs a copy of all
    values, so it is done only when the result shows that it must.
    """
    out = attend(v)
    zero = jnp.zeros((), v.dtype)
    return jax.lax.cond(
        jnp.all(jnp.isfinite(out)), lambda: out, lambda: attend(jnp.where(live, v, zero))
    )


def scores(q_BKGH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """q·k, [B, K, G, S] fp32."""
    return jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)


def soft_cap(logits: jax.Array, softcap: float | None) -> jax.Array:
    """softcap · tanh(logits / softcap); None leaves them."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def gqa_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gqa_decode`; returns out and lse, both fp32."""
    B, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    slots = jnp.arange(S, dtype=jnp.int32)[None]
    live = slots < lengths[:, None]
    if window is not None:
        live &= slots >= lengths[:, None] - window
    live = jnp.broadcast_to(live[:, None], (B, K, S))
    logits = soft_cap(scores(q.reshape(B, K, N // K, H), k) * scale, softcap)
    out, lse = softmax_attend(logits, v, live)
    return out.reshape(B, N, v.shape[-1]), lse.reshape(B, N)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    starts: Sequence[int],
    capacities: Sequence[int],
    lengths: jax.Array,
    scale: float,
    softcap: float | None,
    live_pool: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; one slice of the pool a head, none padded."""
    B, N, H = q.shape
    K = len(starts)
    live_BP = live_rows(starts, capacities, lengths, k_pool.shape[1])
    if live_pool is not None:
        live_BP &= live_pool
    segments = [slice(s, s + size) for s, size in zip(starts, capacities, strict=True)]
    groups = jnp.split(q.reshape(B, K, N // K, H), K, axis=1)
    parts = [
        masked_softmax(
            soft_cap(scores(group, k_pool[:, None, segment]) * scale, softcap),
            live_BP[:, None, segment],
        )
        for group, segment in zip(groups, segments, strict=True)
    ]

    def attend(v: jax.Array) -> jax.Array:
        heads = zip(parts, segments, strict=True)
        return jnp.concatenate(
            [weighted_values(weights, v[:, None, part]) for (weights, _, _), part in heads], axis=1
        )

    total, lse = (jnp.concatenate([part[i] for part in parts], axis=1) for i in (1, 2))
    out = clean_if_needed(attend, v_pool, live_BP[..., None]) / total[..., None]
    return out.reshape(B, N, v_pool.shape[-1]), lse.reshape(B, N)


def live_rows(
    starts: Sequence[int], capacities: Sequence[int], lengths_BK: jax.Array, rows: int
) -> jax.Array:
    """[B, P] bool: the first lengths[b, k] rows of every head's segment."""
    rank, head = np.full(rows, np.iinfo(np.int32).max, np.int32), np.zeros(rows, np.int32)
    for index, (start, capacity) in enumerate(zip(starts, capacities, strict=True)):
        rank[start : start + capacity] = np.arange(capacity)
        head[start : start + capacity] = index
    return jnp.asarray(rank)[None] < lengths_BK[:, head]


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.mla_decode`; returns the latent output and lse, both fp32."""
    slots = jnp.arange(latent.shape[1], dtype=jnp.int32)[None]
    live = (slots < lengths[:, None])[:, None]
    logits = scores(q_latent[:, None], latent[:, None]) + scores(q_rope[:, None], k_rope[:, None])
    out, lse = softmax_attend(logits * scale, latent[:, None], live)
    return out[:, 0], lse[:, 0]
