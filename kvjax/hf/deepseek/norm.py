"""Latents without a norm, in a class that always RMS-normalises them.

Two ways: `neutral` makes the norm do nothing, at the price of one dimension and of biases;
`calibrated` leaves it to act, with the weight for which it changes the typical latent least.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import MLAConfig
from kvjax.finite import OVERFLOW, check_finite
from kvjax.nn import Transformer
from kvjax.nn.layers import matmul
from kvjax.nn.transformer import attention_input, block_kind, embed, layer_output
from kvjax.token_ids import token_ids

MARGIN = 2.0**12
"""The constant dimension over the largest possible ‖latent‖: the norm scales by 1 − 2⁻²⁵ at most,
less than fp32 resolves."""
BATCH = 8  # sequences that go through a layer at a time


@dataclass(frozen=True)
class NormedLatent:
    """A latent c [L] of which norm(x · down + bias) · up is left; M is L, or L + 1.

    Attributes:
        down, bias: [D, M] and [M].
        weight: [M] of the norm.
        up: [M, L].
    """

    down: Float[np.ndarray, "D M"]
    bias: Float[np.ndarray, " M"]
    weight: Float[np.ndarray, " M"]
    up: Float[np.ndarray, "M L"]


def neutral(
    down: Float[np.ndarray, "D L"],
    bias: Float[np.ndarray, " L"],
    input_norm: Float[np.ndarray, " D"],
    margin: float = MARGIN,
) -> NormedLatent:
    """One more dimension, first, of the constant B, so large that it alone sets the rms.

    rms = √((B² + ‖c‖²) / M) = B/√M · (1 + ‖c‖² / 2B²), so a weight of B leaves √M · c, and one of
    1 leaves √M of the constant. B is a power of two and √M goes into `up`: B and the weight are
    exact in bfloat16 too. No text is needed to choose B, because after an RMS norm
    ‖c‖ ≤ √D · ‖diag(input_norm) · down‖ + ‖bias‖.

    Args:
        down, bias: x to the latent.
        input_norm: weight of the RMS norm that x comes from.
        margin: least B / ‖c‖; the relative error is at most 1 / (2 · margin²).
    """
    D, L = down.shape
    largest = np.sqrt(D) * np.linalg.norm(input_norm[:, None] * down) + np.linalg.norm(bias)
    B = 2.0 ** np.ceil(np.log2(margin * largest)) if largest > 0 else 1.0
    root = np.sqrt(L + 1.0)
    return NormedLatent(
        down=np.concatenate([np.zeros((D, 1)), down], axis=1),
        bias=np.concatenate([[B], bias]),
        weight=np.concatenate([[1.0], np.full(L, B)]),
        up=np.concatenate([np.zeros((1, L)), np.eye(L)]) / root,
    )


def calibrated(
    down: Float[np.ndarray, "D L"],
    bias: Float[np.ndarray, " L"],
    rms: Float[np.ndarray, " L"],
) -> NormedLatent:
    """The norm with the weights `rms` (see `latent_rms`): right on average, not for each token.

    The latent is brought to an rms of about 1, where it matters little which eps a loader adds.
    """
    size = float(np.mean(rms))
    L = len(rms)
    return NormedLatent(down / size, bias / size, rms / size, size * np.eye(L))


def latent_rms(
    model: Transformer, params: Mapping[str, Any], batches: Iterable[Int[np.ndarray, "B T"]]
) -> list[Float[np.ndarray, " L"]]:
    """Weights with which an RMS norm changes each layer's latents least, for norm="rms".

    With ρ = rms(c), the weight of dimension i that minimises E|w·c_i/ρ − c_i|² is
    E[c_i²/ρ] / E[c_i²/ρ²]: close to the typical ρ, and one for each dimension.

    Args:
        model: converted, with latent attention in every layer.
        batches: int32 [B, T] of text, without padding, the same T in all.

    Raises:
        ValueError: no batch, ids that the model does not have, a layer of another kind, or latents
            that are not finite.
    """
    rows = list(batches)
    if not rows:
        raise ValueError("got no batch to calibrate on")
    ids = [token_ids(batch, model.config.vocab_size, "calibration") for batch in rows]
    x = embed(model.config, params, np.concatenate(ids))
    weights = []
    for index, layer in enumerate(model.config.layers):
        c, own = layer.attention, params[f"layers_{index}"]
        if not isinstance(c, MLAConfig):
            raise ValueError(f"layer {index} is {type(c).__name__}, expected MLAConfig")
        parts = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
        kind = block_kind(model.config, layer)
        sums = [_moments(attention_input(kind.block, own, part), own["attn"], c) for part in parts]
        first, second = np.sum(np.asarray(sums, np.float64), axis=0)
        check_finite({"latents": first}, f"layer {index}: ", f": {OVERFLOW}")
        weights.append(first / np.maximum(second, np.finfo(np.float64).tiny))
        x = jnp.concatenate([layer_output(kind, own, part) for part in parts])
    return weights


def _moments(x: Float[Array, "B T D"], attn: Mapping[str, Any], c: MLAConfig) -> jax.Array:
    """Sums [2, L] over the tokens of c²/ρ and of c²/ρ²; fp32."""
    latent = matmul(x, attn["kv_a"][:, : c.kv_lora_rank], jnp.float32)
    if c.latent_bias:
        latent += attn["kv_a_bias"][None, None, : c.kv_lora_rank].astype(jnp.float32)
    square = latent**2
    rms = jnp.sqrt(jnp.mean(square, axis=-1, keepdims=True) + 1e-30)
    return jnp.stack([jnp.sum(square / rms, axis=(0, 1)), jnp.sum(square / rms**2, axis=(0, 1))])
