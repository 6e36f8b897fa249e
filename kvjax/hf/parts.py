"""What the model families share: heads, norms, Llama's attention and MLP, RoPE per layer."""

from collections.abc import Callable, Mapping
from typing import Any

from kvjax.config import (
    AttentionConfig,
    GQAConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)
from kvjax.hf.fields import ACTIVATIONS, LAYER_TYPES
from kvjax.hf.rope import rope_config

Raw = Mapping[str, Any]


def head_dim(raw: Raw) -> int:
    """H: given, or D / N."""
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
    """Our name of the activation function."""
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
    """Which kind of attention a layer has: "sliding_attention" or "full_attention".

    `default` tells which layers slide where the config has no `layer_types`.
    """
    kinds = raw.get("layer_types")
    return kinds[index] if kinds else LAYER_TYPES[default(index)]
