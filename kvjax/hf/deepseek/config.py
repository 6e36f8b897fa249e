"""config.json of an exported model."""

import json
from collections.abc import Mapping
from typing import Any

from kvjax.config import MLPConfig, ModelConfig
from kvjax.hf.deepseek.rope import SharedRope

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
"""Valid values for what no layer has: experts and extra prediction layers."""


def describe(c: ModelConfig, rope: SharedRope, params: Mapping[str, Any], norm: str) -> dict:
    """What config.json says.

    Args:
        c: the model that is exported.
        rope: of all layers.
        params: the exported ones; sizes are read off them.
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
    """Keys of config.json that this checkpoint needs obeyed and that some engines pass over."""
    return ["attention_bias"] * (norm == "neutral") + ["rope_parameters"] * (not default_rope)
