"""Converted models as transformers' DeepseekV3ForCausalLM (arXiv 2412.19437) reads them.

The class is latent attention with a decoupled rotary key, as ours is. It differs in four things,
and all of them fold into the weights: pairs are interleaved, the softmax scale is fixed, the latent
is always normalised, and queries have no bias.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.config import MLAConfig, ModelConfig
from kvjax.finite import check_finite
from kvjax.hf.config import config_from_hf
from kvjax.hf.deepseek.config import describe
from kvjax.hf.deepseek.limits import NORMS, latent_configs, problems
from kvjax.hf.deepseek.norm import NormedLatent, calibrated, neutral
from kvjax.hf.deepseek.rope import SharedRope, shared_rope
from kvjax.nn import Transformer

Arrays = dict[str, np.ndarray]


def to_deepseek(
    model: Transformer,
    params: Mapping[str, Any],
    norm: str = "neutral",
    latent_rms: Sequence[np.ndarray] | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """The same function as a model of type deepseek_v3.

    Args:
        model, params: of `kvjax.transmla.convert(method="decoupled")` in folded form.
        norm: "neutral" or "rms"; docs/export.md says which is for what.
        latent_rms: from `kvjax.hf.latent_rms`, for norm="rms".

    Returns:
        A model whose `hf_json` is its config.json, and its parameters, host arrays in the dtype
        of `params`.

    Raises:
        ValueError: lists everything that the class cannot express; or names a parameter that holds
            NaN, or overflows the dtype.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    c = model.config
    reasons = problems(c, params, norm, latent_rms)
    if reasons:
        raise ValueError(f"the deepseek_v3 layout cannot express this model: {'; '.join(reasons)}")
    attention = latent_configs(c)
    rope = shared_rope([a.rope for a in attention if a.rope is not None], c.max_position_embeddings)
    new = _top(c, params)
    dtype = params["embedding"].dtype
    for i, layer in enumerate(attention):
        own = params[f"layers_{i}"]
        norms = {name: _norm_weight(c, own[name]) for name in ("attn_pre_norm", "mlp_pre_norm")}
        attn = _in_stock_terms(layer, own["attn"], rope, i)
        if latent_rms is None:
            attn = with_neutral_norm(attn, layer.kv_lora_rank, norms["attn_pre_norm"])
        else:
            attn = with_calibrated_norm(attn, np.asarray(latent_rms[i], np.float64))
        new[f"layers_{i}"] = {**_cast(norms, dtype), "attn": _cast(attn, dtype), "mlp": own["mlp"]}
        check_finite(new[f"layers_{i}"], f"layers_{i}/", f" in this layout in {dtype}")
    text = json.dumps(describe(c, rope, new, norm), indent=2) + "\n"
    return Transformer(config_from_hf(json.loads(text))), new


def _top(c: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings and output matrix, no longer tied: only the former carry the input's scale."""
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
    """Parameters in fp64 with interleaved pairs and the stock scale; latents and output get the
    biases that they lack."""
    new = {name: np.asarray(value).astype(np.float64) for name, value in attn.items()}
    D = new["kv_a"].shape[0]
    new.setdefault("kv_a_bias", np.zeros(new["kv_a"].shape[1]))
    new.setdefault("o_bias", np.zeros(D))
    if c.q_lora_rank is not None:
        new.setdefault("q_a_bias", np.zeros(c.q_lora_rank))
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
    """Biases for the constants: the latent gets one, and the queries if they have a bias."""
    D = len(input_norm)
    new = {name: attn[name] for name in ("o", "o_bias")}
    latent = neutral(attn["kv_a"][:, :rank], attn["kv_a_bias"][:rank], input_norm)
    new |= _latent(attn, rank, latent)
    new["kv_a_bias"] = np.concatenate([latent.bias, attn["kv_a_bias"][rank:]])
    if "q_a" not in attn and "q_bias" not in attn:
        return new | {"q": attn["q"]}
    down, bias = attn.get("q_a", np.eye(D)), attn.get("q_a_bias", np.zeros(D))
    query = neutral(down, bias, input_norm)
    q = np.einsum("ml,lnh->mnh", query.up, attn["q"])
    if "q_bias" in attn:
        q[0] = attn["q_bias"] / np.sqrt(len(q))  # the constant dimension is √M
    return new | {"q_a": query.down, "q_a_bias": query.bias, "q_norm": query.weight, "q": q}


def with_calibrated_norm(attn: Arrays, rms: np.ndarray) -> Arrays:
    """No bias anywhere, and full-rank queries, whose norm would be one more approximation."""
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
    with np.errstate(over="ignore"):  # what overflows is infinite, and is refused
        return {name: value.astype(dtype) for name, value in arrays.items()}
