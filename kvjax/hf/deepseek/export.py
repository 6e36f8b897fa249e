"""Converted models as transformers' DeepseekV3ForCausalLM (arXiv 2412.19437) reads them.

The class is latent attention with a decoupled rotary key, as ours is. It differs in four things,
and all of them fold into the weights: pairs are interleaved, the softmax scale is fixed, the latent
is always normalised, and queries have no bias."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.checks import OVERFLOW, check_finite, token_ids
from kvjax.config import MLAConfig, ModelConfig
from kvjax.hf.config import config_from_hf
from kvjax.hf.deepseek.checks import NORMS, latent_configs, problems
from kvjax.hf.deepseek.config import SharedRope, describe, shared_rope
from kvjax.nn import Transformer
from kvjax.nn.layers import matmul
from kvjax.nn.transformer import attention_input, block_kind, embed, layer_output

Arrays = dict[str, np.ndarray]


def to_deepseek(
    model: Transformer,
    params: Mapping[str, Any],
    norm: str = "neutral",
    latent_rms: Sequence[np.ndarray] | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """The same function, as a model of type deepseek_v3.

    Args:
        model, params: from `kvjax.transmla.convert(method="decoupled", mode="fold")`.
        norm: "neutral" or "rms"; docs/export.md compares them.
        latent_rms: from `kvjax.hf.latent_rms`, for norm="rms".

    Returns:
        A model whose `hf_json` is its config.json, and its parameters, host arrays in the dtype
        of `params`.

    Raises:
        ValueError: lists everything that the class cannot express, or names a parameter that has
            NaN or overflows the dtype.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    c = model.config
    reasons = problems(c, params, norm, latent_rms)
    if reasons:
        raise ValueError(f"the deepseek_v3 layout cannot express this model: {'; '.join(reasons)}")
    attention = latent_configs(c)
    rope = shared_rope([a.rope for a in attention if a.rope is not None], c.max_position_embeddings)
    # The embedding's scale, the offset of the norms and a tied output matrix fold into weights.
    new = _top(c, params)
    dtype = params["embedding"].dtype
    for i, layer in enumerate(attention):
        own = params[f"layers_{i}"]
        norms = {name: _norm_weight(c, own[name]) for name in ("attn_pre_norm", "mlp_pre_norm")}
        # The layer in the class's terms, then one of two answers to its norm of the latent.
        attn = _in_stock_terms(layer, own["attn"], rope, i)
        if latent_rms is None:
            attn = with_neutral_norm(attn, layer.kv_lora_rank, norms["attn_pre_norm"])
        else:
            attn = with_calibrated_norm(attn, np.asarray(latent_rms[i], np.float64))
        new[f"layers_{i}"] = {**_cast(norms, dtype), "attn": _cast(attn, dtype), "mlp": own["mlp"]}
        check_finite(new[f"layers_{i}"], f"layers_{i}/", f" in this layout in {dtype}")
    # The model is read back from its config.json, so that both agree by construction.
    text = json.dumps(describe(c, rope, new, norm), indent=2) + "\n"
    return Transformer(config_from_hf(json.loads(text))), new


def _top(c: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Embedding and output matrix, untied, because only the embedding gets the input's scale."""
    embedding = np.asarray(params["embedding"])
    head = embedding.T if c.tie_embeddings else params["lm_head"]
    if c.embedding_scale != 1.0:
        scale = np.asarray(c.embedding_scale, embedding.dtype).astype(np.float64)
        embedding = (embedding.astype(np.float64) * scale).astype(embedding.dtype)
    final = _norm_weight(c, params["final_norm"]).astype(embedding.dtype)
    return {"embedding": embedding, "final_norm": final, "lm_head": head}


def _norm_weight(c: ModelConfig, weight: Any) -> np.ndarray:
    return np.asarray(weight).astype(np.float64) + c.norm.offset


def _in_stock_terms(c: MLAConfig, attn: Mapping[str, Any], rope: SharedRope, layer: int) -> Arrays:
    """Parameters in fp64 with interleaved pairs and the class's softmax scale.

    Missing biases of latents and output become zeros.
    """
    new = {name: np.asarray(value).astype(np.float64) for name, value in attn.items()}
    D = new["kv_a"].shape[0]
    new.setdefault("kv_a_bias", np.zeros(new["kv_a"].shape[1]))
    new.setdefault("o_bias", np.zeros(D))
    if c.q_lora_rank is not None:
        new.setdefault("q_a_bias", np.zeros(c.q_lora_rank))
    # The class divides logits by √(nope + R); the ratio to our scale goes into the queries.
    scale = c.scale * np.sqrt(c.qk_nope_head_dim + rope.dim)
    for name, plain in {
        "q": c.qk_nope_head_dim,
        "q_bias": c.qk_nope_head_dim,
        "kv_a": c.kv_lora_rank,
        "kv_a_bias": c.kv_lora_rank,
    }.items():
        if name not in new:
            continue
        still, turning = np.split(new[name], [plain], axis=-1)
        joined = np.concatenate([still, rope.spread(turning, layer)], axis=-1)
        new[name] = joined * scale if name.startswith("q") else joined
    return new


def with_neutral_norm(attn: Arrays, rank: int, input_norm: np.ndarray) -> Arrays:
    """Adds a constant dimension to the latent, and to the queries if they have a bias."""
    D = len(input_norm)
    new = {name: attn[name] for name in ("o", "o_bias")}
    latent = neutral(attn["kv_a"][:, :rank], attn["kv_a_bias"][:rank], input_norm)
    new |= _latent(attn, rank, latent)
    new["kv_a_bias"] = np.concatenate([latent.bias, attn["kv_a_bias"][rank:]])
    # The class has no bias on full-rank queries, but has one on their low-rank input.
    if "q_a" not in attn and "q_bias" not in attn:
        return new | {"q": attn["q"]}
    down, bias = attn.get("q_a", np.eye(D)), attn.get("q_a_bias", np.zeros(D))
    query = neutral(down, bias, input_norm)
    q = np.einsum("ml,lnh->mnh", query.up, attn["q"])
    if "q_bias" in attn:
        q[0] = attn["q_bias"] / np.sqrt(len(q))  # the constant dimension is √M
    return new | {"q_a": query.down, "q_a_bias": query.bias, "q_norm": query.weight, "q": q}


def with_calibrated_norm(attn: Arrays, rms: np.ndarray) -> Arrays:
    """Weights without biases. Queries get full rank, because their norm would be inexact too."""
    rank = len(rms)
    latent = calibrated(attn["kv_a"][:, :rank], attn["kv_a_bias"][:rank], rms)
    q = np.einsum("dl,lnh->dnh", attn["q_a"], attn["q"]) if "q_a" in attn else attn["q"]
    return {"q": q, "o": attn["o"], **_latent(attn, rank, latent)}


def _latent(attn: Arrays, rank: int, latent: NormedLatent) -> Arrays:
    return {
        "kv_a": np.concatenate([latent.down, attn["kv_a"][:, rank:]], axis=1),
        "kv_norm": latent.weight,
        "k_up": np.einsum("ml,lnh->mnh", latent.up, attn["k_up"]),
        "v_up": np.einsum("ml,lnh->mnh", latent.up, attn["v_up"]),
    }


def _cast(arrays: Arrays, dtype: Any) -> Arrays:
    with np.errstate(over="ignore"):  # overflow gives infinity, which check_finite refuses
        return {name: value.astype(dtype) for name, value in arrays.items()}


MARGIN = 2.0**12
"""Ratio of the constant dimension to the largest possible ‖latent‖. The norm then scales by at most
1 − 2⁻²⁵, which fp32 does not resolve."""
BATCH = 8  # sequences that go through a layer at a time


@dataclass(frozen=True)
class NormedLatent:
    """Weights for which norm(x · down + bias) · up is the latent c [L]; M is L or L + 1.

    Attributes:
        down, bias: projection of x, [D, M] and [M].
        weight: of the RMS norm, [M].
        up: [M, L], to be multiplied into the projections from the latent.
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
    """A norm without effect: a new first dimension with a constant B that dominates the rms.

    rms = √((B² + ‖c‖²) / M) = B/√M · (1 + ‖c‖² / 2B²), so a weight of B leaves √M · c, and one of
    1 leaves √M of the constant. B is a power of two and √M goes into `up`: B and the weight are
    exact in bfloat16 too. No text is needed to choose B, because after an RMS norm
    ‖c‖ ≤ √D · ‖diag(input_norm) · down‖ + ‖bias‖.

    Args:
        down, bias: projection of x to the latent.
        input_norm: weight of the RMS norm whose output is x.
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
    """The norm with the weights `rms` from `latent_rms`: exact on average, not for each token.

    The latent is scaled to an rms of about 1, where the eps of a loader matters little.
    """
    size = float(np.mean(rms))
    L = len(rms)
    return NormedLatent(down / size, bias / size, rms / size, size * np.eye(L))


def latent_rms(
    model: Transformer, params: Mapping[str, Any], batches: Iterable[Int[np.ndarray, "B T"]]
) -> list[Float[np.ndarray, " L"]]:
    """The weights of an RMS norm that changes each layer's latents least, for norm="rms".

    With ρ = rms(c), the weight of dimension i that minimises E|w·c_i/ρ − c_i|² is
    E[c_i²/ρ] / E[c_i²/ρ²], which is close to the typical ρ.

    Args:
        model: converted, with latent attention in every layer.
        batches: int32 [B, T] of text, without padding, with the same T in all batches.

    Raises:
        ValueError: `batches` is empty, an id is outside the vocabulary, a layer has no latent
            attention, or latents are not finite.
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
        block = block_kind(model.config, layer).block
        sums = [_moments(attention_input(block, own, part), own["attn"], c) for part in parts]
        first, second = np.sum(np.asarray(sums, np.float64), axis=0)
        check_finite({"latents": first}, f"layer {index}: ", f": {OVERFLOW}")
        weights.append(first / np.maximum(second, np.finfo(np.float64).tiny))
        x = jnp.concatenate(
            [layer_output(block_kind(model.config, layer), own, part) for part in parts]
        )
    return weights


def _moments(x: Float[Array, "B T D"], attn: Mapping[str, Any], c: MLAConfig) -> jax.Array:
    """Sums [2, L] over the tokens of c²/ρ and of c²/ρ²; fp32."""
    latent = matmul(x, attn["kv_a"][:, : c.kv_lora_rank], jnp.float32)
    if c.latent_bias:
        latent += attn["kv_a_bias"][None, None, : c.kv_lora_rank].astype(jnp.float32)
    square = latent**2
    rms = jnp.sqrt(jnp.mean(square, axis=-1, keepdims=True) + 1e-30)
    return jnp.stack([jnp.sum(square / rms, axis=(0, 1)), jnp.sum(square / rms**2, axis=(0, 1))])
