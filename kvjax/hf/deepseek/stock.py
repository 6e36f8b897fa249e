"""What transformers' DeepseekV3ForCausalLM holds where all its MLPs are dense.

Read off the class's constructor, not off our writer, so that the one can check the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]


def stock_tensors(raw: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor that the class expects.

    Args:
        raw: config.json of type deepseek_v3.

    Raises:
        ValueError: layers with experts, or a key that is missing.
    """
    try:
        layers = raw["num_hidden_layers"]
        if raw["first_k_dense_replace"] < layers:
            raise ValueError(
                f"first_k_dense_replace is {raw['first_k_dense_replace']}, expected {layers}: "
                "all MLPs are dense"
            )
        D, V = raw["hidden_size"], raw["vocab_size"]
        one = {**_attention(raw), **_mlp(raw)}
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}") from None
    top = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return top | {f"model.layers.{i}.{name}": one[name] for i in range(layers) for name in one}


def _attention(raw: Mapping[str, Any]) -> dict[str, Shape]:
    D, N, L = raw["hidden_size"], raw["num_attention_heads"], raw["kv_lora_rank"]
    nope, rope, v = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["v_head_dim"]
    M, queries = raw["q_lora_rank"], N * (nope + rope)
    weights = {
        "kv_a_proj_with_mqa.weight": (L + rope, D),
        "kv_a_layernorm.weight": (L,),
        "kv_b_proj.weight": (N * (nope + v), L),
        "o_proj.weight": (D, N * v),
    }
    biases = {"kv_a_proj_with_mqa.bias": (L + rope,), "o_proj.bias": (D,)}
    if M is None:
        weights["q_proj.weight"] = (queries, D)
    else:
        weights["q_a_proj.weight"] = (M, D)
        weights["q_a_layernorm.weight"] = (M,)
        weights["q_b_proj.weight"] = (queries, M)
        biases["q_a_proj.bias"] = (M,)
    both = weights | (biases if raw["attention_bias"] else {})
    return {f"self_attn.{name}": shape for name, shape in both.items()}


def _mlp(raw: Mapping[str, Any]) -> dict[str, Shape]:
    D, F = raw["hidden_size"], raw["intermediate_size"]
    return {
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
