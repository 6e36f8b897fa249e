"""Decode attention in plain jnp: the "xla" implementation of dense and latent caches.

It also is the oracle of the kernels' tests. Logits, softmax and accumulators are fp32 for every
dtype of the entries. Dead slots are replaced before they are used: their contents, NaN included,
never reach the output.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.entries import NEG_INF, Entries, Quantized, Segments, plain, soft_cap


def softmax_attend(
    logits_BKGS: jax.Array, v_BKSH: Entries, live_BKS: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the live slots, then the weighted sum of the values.

    Args:
        logits_BKGS: [B, K, G, S] fp32 logits of the G queries that read the same KV head.
        dtype: the dtype in which quantized values are multiplied.

    Returns:
        out [B, K, G, Hv] fp32 and lse [B, K, G] fp32, −1e30 where no slot is live.
    """
    weights, total, lse = masked_softmax(logits_BKGS, live_BKS)
    # The scale of a value multiplies its weight. Scales of dead slots may be NaN.
    if isinstance(v_BKSH, Quantized):
        weights = weights * jnp.where(live_BKS, v_BKSH.scale, 0.0)[:, :, None]
    values = plain(v_BKSH, dtype)
    out = clean_if_needed(lambda v: weighted_values(weights, v), values, live_BKS[..., None])
    return out / total[..., None], lse


def masked_softmax(
    logits_BKGS: jax.Array, live_BKS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax weights before the division, the divisor [B, K, G], and the lse [B, K, G]."""
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

    0 · NaN is NaN, so dead values that are not finite must become 0 first. That copies all values,
    so it is done only if the result has numbers that are not finite.
    """
    out = attend(v)
    zero = jnp.zeros((), v.dtype)
    return jax.lax.cond(
        jnp.all(jnp.isfinite(out)), lambda: out, lambda: attend(jnp.where(live, v, zero))
    )


def attention_logits(q_BKGH: jax.Array, k_BKSH: Entries) -> jax.Array:
    """Products of queries and keys, [B, K, G, S] fp32."""
    keys = plain(k_BKSH, q_BKGH.dtype)
    logits = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, keys, preferred_element_type=jnp.float32)
    return logits * k_BKSH.scale[:, :, None] if isinstance(k_BKSH, Quantized) else logits


def gqa_decode(
    q: jax.Array,
    k: Entries,
    v: Entries,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.gqa_decode`; returns out and lse, both fp32."""
    B, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    live = jnp.broadcast_to(live_slots(lengths, S, window)[:, None], (B, K, S))
    logits = soft_cap(attention_logits(q.reshape(B, K, N // K, H), k) * scale, softcap)
    out, lse = softmax_attend(logits, v, live, q.dtype)
    return out.reshape(B, N, v.shape[-1]), lse.reshape(B, N)


def live_slots(lengths: jax.Array, slots: int, window: int | None) -> jax.Array:
    """[B, slots] bool: slots below each sequence's length, and within its last `window` ones."""
    at = jnp.arange(slots, dtype=jnp.int32)[None]
    live = at < lengths[:, None]
    return live if window is None else live & (at >= lengths[:, None] - window)


def ragged_gqa_decode(
    q: jax.Array,
    k_pool: Entries,
    v_pool: Entries,
    segments: Segments,
    lengths: jax.Array,
    scale: float,
    softcap: float | None,
    live_pool: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.ragged_gqa_decode`; returns out and lse, both fp32.

    Only tests call this: it gathers as many rows for each head as the pool has. The "xla"
    implementation is `xla.attend`.
    """
    (B, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    rank = jnp.arange(P, dtype=jnp.int32)[None, None]
    rows = jnp.clip(segments.starts[:, :, None] + rank, 0, P - 1)
    # Row r of every head is row starts + r of the pool; ranks from a head's length on are dead.
    live = rank < jnp.minimum(lengths, segments.room(P))[:, :, None]
    batch = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    if live_pool is not None:
        live &= live_pool[batch, rows]
    k, v = jax.tree.map(lambda leaf: leaf[batch, rows], (k_pool, v_pool))
    logits = soft_cap(attention_logits(q.reshape(B, K, N // K, H), k) * scale, softcap)
    out, lse = softmax_attend(logits, v, live, q.dtype)
    return out.reshape(B, N, v.shape[-1]), lse.reshape(B, N)


def mla_decode(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: Entries,
    k_rope: Entries,
    lengths: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.mla_decode`; returns the latent output and lse, both fp32."""
    live = live_slots(lengths, latent.shape[1], window)[:, None]
    # A latent cache has one KV head, whose latents are keys and values of all query heads.
    latent, k_rope = jax.tree.map(lambda x: x[:, None], (latent, k_rope))
    logits = attention_logits(q_latent[:, None], latent) + attention_logits(q_rope[:, None], k_rope)
    logits = soft_cap(logits * scale, softcap)
    out, lse = softmax_attend(logits, latent, live, q_latent.dtype)
    return out[:, 0], lse[:, 0]
