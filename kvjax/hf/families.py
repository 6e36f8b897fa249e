"""One small function per model family: its config.json → ModelConfig.

Every function gets the config over the family's defaults, because a file may leave out what
equals the default of transformers' config class. The parts that families share come last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvjax.config import (
    AttentionConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)
from kvjax.hf.fields import ACTIVATIONS, DEFAULT_EXPERTS, LAYER_TYPES
from kvjax.hf.rope import rope_config, rope_settings, yarn_mscale

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How to read one model_type.

    Attributes:
        build: config over defaults → ModelConfig.
        defaults: values of keys that the file may leave out.
    """

    build: Callable[[Raw], ModelConfig]
    defaults: Raw


FAMILIES: dict[str, Family] = {}
"""model_type → its family."""


def family(**defaults: Any) -> Callable[[Callable[[Raw], ModelConfig]], Callable]:
    """Registers a function under its name, which is the model_type."""

    def register(build: Callable[[Raw], ModelConfig]) -> Callable[[Raw], ModelConfig]:
        # Gemma names its activation by another key, which then has the default.
        act = {} if "hidden_activation" in defaults else {"hidden_act": "silu"}
        FAMILIES[build.__name__] = Family(build, {"rms_norm_eps": 1e-6, **act, **defaults})
        return build

    return register


GEMMA = {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": None,
}
QWEN = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32_768,
}


@family(max_position_embeddings=2048, attention_bias=False, mlp_bias=False)
def llama(raw: Raw) -> ModelConfig:
    """Llama 1 to 3 (arXiv 2302.13971, 2307.09288, 2407.21783)."""
    layer = attention(raw)
    return decoder(raw, lambda i: layer, lambda i: mlp(raw))


@family(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072)
def mistral(raw: Raw) -> ModelConfig:
    """Mistral: llama with a sliding window in all layers (arXiv 2310.06825)."""
    layer = attention(raw, window=raw["sliding_window"], qkv_bias=False, out_bias=False)
    return decoder(raw, lambda i: layer, lambda i: mlp(raw))


@family(**QWEN)
def qwen2(raw: Raw) -> ModelConfig:
    """Qwen 2 and 2.5: biases on q, k, v (arXiv 2407.10671)."""

    def layer(i: int) -> GQAConfig:
        return attention(raw, window=_qwen_window(raw, i), qkv_bias=True, out_bias=False)

    return decoder(raw, layer, lambda i: mlp(raw))


@family(**QWEN, head_dim=128, attention_bias=False)
def qwen3(raw: Raw) -> ModelConfig:
    """Qwen 3: a norm on each head of q and k (arXiv 2505.09388)."""
    return decoder(
        raw,
        lambda i: attention(raw, window=_qwen_window(raw, i), qk_norm="head"),
        lambda i: mlp(raw),
    )


@family(
    **QWEN,
    attention_bias=False,
    num_key_value_heads=4,
    num_experts=None,
    num_local_experts=None,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=False,
    mlp_only_layers=None,
    decoder_sparse_step=1,
)
def qwen3_moe(raw: Raw) -> ModelConfig:
    """Qwen 3 with experts in every `decoder_sparse_step`-th layer."""
    # transformers has two names for the number of experts.
    num_experts = raw["num_experts"] or raw["num_local_experts"] or DEFAULT_EXPERTS
    experts = MoEConfig(
        num_experts=num_experts,
        top_k=raw["num_experts_per_tok"],
        width=raw["moe_intermediate_size"],
        activation=activation(raw),
        normalize=bool(raw["norm_topk_prob"]),
    )
    layer = attention(
        raw, qk_norm="head", window=raw["sliding_window"] if raw["use_sliding_window"] else None
    )

    def feed_forward(i: int) -> MLPConfig | MoEConfig:
        dense = i in (raw["mlp_only_layers"] or ()) or (i + 1) % raw["decoder_sparse_step"]
        return mlp(raw) if dense else experts

    return decoder(raw, lambda i: layer, feed_forward)


@family(
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    default_theta=1e6,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=None,
    max_position_embeddings=131_072,
)
def mixtral(raw: Raw) -> ModelConfig:
    """Mistral with experts (arXiv 2401.04088)."""
    layer = attention(raw, window=raw["sliding_window"], qkv_bias=False, out_bias=False)
    experts = MoEConfig(
        raw["num_local_experts"],
        raw["num_experts_per_tok"],
        raw["intermediate_size"],
        activation(raw),
    )
    return decoder(raw, lambda i: layer, lambda i: experts)


@family(
    **GEMMA,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    max_position_embeddings=8192,
)
def gemma2(raw: Raw) -> ModelConfig:
    """Gemma 2: soft-caps, norms around each sub-layer, a sliding window in every other layer
    (arXiv 2408.00118)."""

    def layer(i: int) -> GQAConfig:
        sliding = layer_type(raw, i, lambda i: i % 2 == 0) == "sliding_attention"
        return attention(
            raw,
            scale=raw["query_pre_attn_scalar"] ** -0.5,
            window=raw["sliding_window"] if sliding else None,
            softcap=raw["attn_logit_softcapping"],
        )

    return decoder(raw, layer, lambda i: mlp(raw), **_gemma(raw))


@family(
    **GEMMA,
    final_logit_softcapping=None,
    sliding_window_pattern=None,
    rope_local_base_freq=None,
    max_position_embeddings=131_072,
)
def gemma3_text(raw: Raw) -> ModelConfig:
    """Gemma 3: five layers with a sliding window for each layer without, two RoPEs, QK-norm
    (arXiv 2503.19786)."""
    pattern = raw["sliding_window_pattern"] or 6
    H = head_dim(raw)

    def layer(i: int) -> GQAConfig:
        kind = layer_type(raw, i, lambda i: (i + 1) % pattern != 0)
        sliding = kind == "sliding_attention"
        return attention(
            raw,
            scale=raw["query_pre_attn_scalar"] ** -0.5,
            window=raw["sliding_window"] if sliding else None,
            qk_norm="head",
            norm=norm(raw, offset=1.0),
            rope=rope_config(_local_rope(raw) if sliding else raw, H, 1e6, kind),
        )

    return decoder(raw, layer, lambda i: mlp(raw), **_gemma(raw))


@family(
    num_key_value_heads=4,
    default_theta=2e6,
    attention_bias=False,
    mlp_bias=False,
    no_rope_layers=None,
    no_rope_layer_interval=4,
    use_sliding_window=False,
    sliding_window=None,
    tie_word_embeddings=True,
    max_position_embeddings=32_768,
)
def smollm3(raw: Raw) -> ModelConfig:
    """SmolLM 3: llama without RoPE in every fourth layer."""
    interval = raw["no_rope_layer_interval"]
    # The key says the opposite of its name: 1 marks a layer with RoPE.
    rotates = raw["no_rope_layers"] or [
        (i + 1) % interval != 0 for i in range(raw["num_hidden_layers"])
    ]
    window = raw["sliding_window"] if raw["use_sliding_window"] else None

    def layer(i: int) -> GQAConfig:
        slides = layer_type(raw, i, lambda i: window is not None and not rotates[i])
        changes = {} if rotates[i] else {"rope": None}
        return attention(raw, window=window if slides == "sliding_attention" else None, **changes)

    return decoder(raw, layer, lambda i: mlp(raw))


@family(rms_norm_eps=1e-5, max_position_embeddings=2048, attention_bias=False)
def olmo2(raw: Raw) -> ModelConfig:
    """OLMo 2: norms only after the sub-layers, and over all heads of q and k (2501.00656)."""
    layer = attention(raw, qk_norm="all")
    return decoder(raw, lambda i: layer, lambda i: mlp(raw), pre_norm=False, post_norm=True)


@family(
    rms_norm_eps=1e-5,
    sliding_window=None,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
)
def phi3(raw: Raw) -> ModelConfig:
    """Phi 3 and 4: llama with fused projections, partial and long RoPE (arXiv 2404.14219)."""
    layer = attention(raw, window=raw["sliding_window"], qkv_bias=False, out_bias=False)
    return decoder(raw, lambda i: layer, lambda i: mlp(raw))


@family(
    attention_bias=False,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
    max_position_embeddings=4096,
)
def deepseek_v3(raw: Raw) -> ModelConfig:
    """DeepSeek V3's latent attention (arXiv 2412.19437) with dense MLPs.

    Raises:
        ValueError: the model has experts.
    """
    dense, layers = raw["first_k_dense_replace"], raw["num_hidden_layers"]
    if dense < layers:
        raise ValueError(
            f"deepseek_v3 with experts is not supported: first_k_dense_replace is {dense}, "
            f"expected at least num_hidden_layers = {layers}"
        )
    nope, R = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
    bias = raw["attention_bias"]
    layer = MLAConfig(
        num_heads=raw["num_attention_heads"],
        qk_nope_head_dim=nope,
        qk_rope_head_dim=R,
        v_head_dim=raw["v_head_dim"],
        kv_lora_rank=raw["kv_lora_rank"],
        q_lora_rank=raw["q_lora_rank"],
        scale=(nope + R) ** -0.5 * _deepseek_mscale(raw) ** 2,
        rope=rope_config(raw, R, 10_000.0, interleaved=bool(raw["rope_interleave"])),
        # transformers gives the latent norms its default eps, whatever rms_norm_eps says.
        latent_norm=NormConfig(eps=1e-6),
        latent_bias=bias,
        out_bias=bias,
    )
    return decoder(raw, lambda i: layer, lambda i: mlp(raw))


# --- Parts of one or two families --------------------------------------------------------------


def _qwen_window(raw: Raw, index: int) -> int | None:
    if not raw["use_sliding_window"]:
        return None
    kind = layer_type(raw, index, lambda i: i >= raw["max_window_layers"])
    return raw["sliding_window"] if kind == "sliding_attention" else None


def _gemma(raw: Raw) -> dict[str, Any]:
    """Settings of the whole model in Gemma 2 and 3.

    Raises:
        ValueError: the attention is not causal.
    """
    if raw["use_bidirectional_attention"]:
        raise ValueError("use_bidirectional_attention is set, expected a causal model")
    return {
        "norm": norm(raw, offset=1.0),
        "post_norm": True,
        "embedding_scale": math.sqrt(raw["hidden_size"]),
        "final_softcap": raw["final_logit_softcapping"],
    }


def _local_rope(raw: Raw) -> Raw:
    """The RoPE of layers with a sliding window in old configs: base rope_local_base_freq, no
    scaling."""
    if "sliding_attention" in rope_settings(raw):
        return raw
    theta = raw["rope_local_base_freq"] or 10_000.0
    return {**raw, "rope_theta": theta, "rope_scaling": None, "rope_parameters": None}


def _deepseek_mscale(raw: Raw) -> float:
    """YaRN's mscale_all_dim, which DeepSeek applies to the softmax scale."""
    settings = rope_settings(raw)
    all_dim = settings.get("mscale_all_dim") or 0.0
    return yarn_mscale(settings.get("factor") or 1.0, all_dim) if all_dim else 1.0


# --- Parts that all families share -------------------------------------------------------------


def head_dim(raw: Raw) -> int:
    """H: head_dim if the config has it, else D / N."""
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def norm(raw: Raw, offset: float = 0.0) -> NormConfig:
    """The RMS norm of the residual stream."""
    return NormConfig(eps=float(raw["rms_norm_eps"]), offset=offset)


def attention(raw: Raw, **changes: Any) -> GQAConfig:
    """Llama's attention, with `changes`."""
    N, H = raw["num_attention_heads"], head_dim(raw)
    K = raw.get("num_key_value_heads") or N
    bias = bool(raw.get("attention_bias", False))
    base = {
        "num_heads": N,
        "num_kv_heads": K,
        "head_dim": H,
        "scale": H**-0.5,
        "qkv_bias": bias,
        "out_bias": bias,
        "norm": norm(raw),
    }
    if "rope" not in changes:
        base["rope"] = rope_config(raw, H, raw.get("default_theta", 10_000.0))
    return GQAConfig(**{**base, **changes})


def mlp(raw: Raw) -> MLPConfig:
    """The gated MLP."""
    bias = bool(raw.get("mlp_bias", False))
    return MLPConfig(raw["intermediate_size"], activation(raw), bias=bias)


def activation(raw: Raw) -> str:
    """Our name for the activation function."""
    return ACTIVATIONS[raw["hidden_activation" if "hidden_activation" in raw else "hidden_act"]]


def decoder(
    raw: Raw,
    attention: Callable[[int], AttentionConfig],
    mlp: Callable[[int], MLPConfig | MoEConfig],
    **changes: Any,
) -> ModelConfig:
    """A model from the attention and the MLP of each layer index, with `changes`."""
    layers = (LayerConfig(attention(i), mlp(i)) for i in range(raw["num_hidden_layers"]))
    base = {
        "model_type": raw["model_type"],
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "layers": tuple(layers),
        "norm": norm(raw),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "max_position_embeddings": raw["max_position_embeddings"],
    }
    return ModelConfig(**{**base, **changes})


def layer_type(raw: Raw, index: int, default: Callable[[int], bool]) -> str:
    """The kind of a layer's attention: "sliding_attention" or "full_attention".

    Args:
        default: whether layer i has a sliding window, for configs without `layer_types`.
    """
    kinds = raw.get("layer_types")
    return kinds[index] if kinds else LAYER_TYPES[default(index)]
