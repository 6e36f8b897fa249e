"""config.json of an exported model, with the one RoPE that all layers share."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kvjax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLPConfig,
    ModelConfig,
    RopeConfig,
    SelectedPairs,
)
from kvjax.nn.layers import frequencies

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
UNUSED = {
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
"""Valid values for parts that no layer has: experts and extra prediction layers."""


def describe(c: ModelConfig, rope: SharedRope, params: Mapping[str, Any], norm: str) -> dict:
    """The content of config.json.

    Args:
        c: of the model before the export.
        rope: shared by all layers.
        params: the exported parameters, whose shapes give the sizes.
        norm: "neutral" or "rms".
    """
    attn, mlp = params["layers_0"]["attn"], c.layers[0].mlp
    assert isinstance(mlp, MLPConfig)
    eos = list(c.eos_ids)
    default_rope = rope.parameters["rope_type"] == "default"
    raw = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": mlp.width,
        "moe_intermediate_size": mlp.width,
        "num_hidden_layers": c.num_layers,
        "first_k_dense_replace": c.num_layers,
        "num_attention_heads": attn["o"].shape[0],
        "num_key_value_heads": attn["o"].shape[0],
        "kv_lora_rank": len(attn["kv_norm"]),
        "q_lora_rank": len(attn["q_norm"]) if "q_norm" in attn else None,
        "qk_nope_head_dim": attn["k_up"].shape[2],
        "qk_rope_head_dim": rope.dim,
        "v_head_dim": attn["v_up"].shape[2],
        "attention_bias": norm == "neutral",
        "hidden_act": ACTIVATIONS[mlp.activation],
        "rms_norm_eps": c.norm.eps,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_interleave": True,
        "rope_parameters": rope.parameters,
        # Readers older than transformers 5 look here.
        "rope_theta": rope.parameters["rope_theta"],
        "rope_scaling": None if default_rope else rope.parameters,
        "tie_word_embeddings": False,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": json.loads(c.hf_json).get("pad_token_id"),
        "dtype": params["embedding"].dtype.name,
        **UNUSED,
    }
    requires = _requires(norm, default_rope)
    return raw | ({"kvjax_requires": requires} if requires else {})


def _requires(norm: str, default_rope: bool) -> list[str]:
    """Keys of config.json that this checkpoint needs and that some engines ignore."""
    return ["attention_bias"] * (norm == "neutral") + ["rope_parameters"] * (not default_rope)


Pairs = tuple[int, ...]


@dataclass(frozen=True)
class SharedRope:
    """One RoPE for all layers, and the place of each layer's components in it.

    Attributes:
        parameters: config.json's `rope_parameters`.
        dim: R, the rotary width of every layer.
        columns: for each layer, the places of its rotary components among the R interleaved ones.
    """

    parameters: dict[str, Any]
    dim: int
    columns: tuple[tuple[int, ...], ...]

    def spread(self, x: Float[np.ndarray, "*rest r"], layer: int) -> Float[np.ndarray, "*rest R"]:
        """Rotary components of a layer in the shared order; those of other layers are 0."""
        out = np.zeros((*x.shape[:-1], self.dim))
        out[..., list(self.columns[layer])] = x
        return out


def shared_rope(ropes: Sequence[RopeConfig], context: int) -> SharedRope:
    """One RoPE for all layers.

    Layers with different frequencies share their union, which is exact and makes the rotary key
    wider. Evenly spaced frequencies keep their rule (default, linear, llama3). Any other list of
    frequencies, YaRN's included, is written as the divisors of "longrope", because a loader
    computes its frequencies from such a rule.

    Args:
        ropes: one per layer.
        context: max_position_embeddings.

    Raises:
        ValueError: the layers have different rules, or config.json cannot express the rule.
    """
    selections = [_selection(rope) for rope in ropes]
    bases = {base for base, _ in selections}
    if len(bases) != 1:
        raise ValueError(f"the layers have {len(bases)} different RoPEs, expected one")
    # A Counter, because a layer may have the same frequency several times: | takes the maximum.
    union = functools.reduce(operator.or_, (Counter(pairs) for _, pairs in selections))
    shared = tuple(sorted(union.elements()))
    columns = (
        _columns(pairs, shared, rope.interleaved)
        for rope, (_, pairs) in zip(ropes, selections, strict=True)
    )
    return SharedRope(
        rope_parameters(bases.pop(), shared, context), 2 * len(shared), tuple(columns)
    )


def _selection(rope: RopeConfig) -> tuple[RopeConfig, Pairs]:
    """The RoPE whose frequencies these are, and which of them."""
    if not isinstance(rope.scaling, SelectedPairs):
        return dataclasses.replace(rope, interleaved=False), tuple(range(rope.dim // 2))
    base, pairs = _selection(rope.scaling.of)
    return base, tuple(pairs[i] for i in rope.scaling.pairs)


def _columns(pairs: Pairs, shared: Pairs, interleaved: bool) -> tuple[int, ...]:
    """The place of each component; a pair that occurs n times has n places."""
    places = [shared.index(p) + pairs[:i].count(p) for i, p in enumerate(pairs)]
    first, second = [2 * p for p in places], [2 * p + 1 for p in places]
    if interleaved:
        return tuple(column for pair in zip(first, second, strict=True) for column in pair)
    return (*first, *second)


def rope_parameters(base: RopeConfig, pairs: Pairs, context: int) -> dict[str, Any]:
    """The `rope_parameters` with which transformers computes these frequencies of `base`.

    Raises:
        ValueError: the scaling is dynamic NTK, which transformers changes with the text's length.
    """
    rule, f = base.rule, base.dim // 2
    if isinstance(rule, DynamicScaling):
        raise ValueError("dynamic NTK RoPE depends on the rotary width and on the text's length")
    # Every k-th of f frequencies is the same rule for f / k pairs.
    even = f % len(pairs) == 0 and pairs == tuple(range(0, f, f // len(pairs)))
    if even and rule is None:
        return {"rope_type": "default", "rope_theta": base.theta}
    if even and isinstance(rule, LinearScaling):
        return {"rope_type": "linear", "rope_theta": base.theta, "factor": rule.factor}
    if even and isinstance(rule, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "rope_theta": base.theta,
            "factor": rule.factor,
            "low_freq_factor": rule.low_freq_factor,
            "high_freq_factor": rule.high_freq_factor,
            "original_max_position_embeddings": rule.original_length,
        }
    return _listed(base, pairs, context)


def _listed(base: RopeConfig, pairs: Pairs, context: int) -> dict[str, Any]:
    """Explicit frequencies. With base 1, longrope's formula reduces to 1 / divisor."""
    rule = base.rule
    original = rule.original_length if isinstance(rule, LongRopeScaling) else context
    # A length of 1 selects the short factors, and a length above `original` the long ones.
    inverse, attention_factor = frequencies(base, jnp.asarray([1, original + 1], jnp.int32))
    divisors = 1.0 / np.asarray(inverse, np.float64)[:, list(pairs)]
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": divisors[0].tolist(),
        "long_factor": divisors[-1].tolist(),
        "factor": 1.0,
        "attention_factor": float(attention_factor),
        "original_max_position_embeddings": original,
    }
