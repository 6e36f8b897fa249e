"""Tiny random checkpoints that transformers itself writes; needs torch."""

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 6.0],
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": GEMMA3_ROPE,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 9,
        "original_max_position_embeddings": 16,
        "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5},
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_mtp_layers": 0,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "deepseek_v3_full_q": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_mtp_layers": 0,
        "attention_bias": True,
        "rope_interleave": False,
    },
}


def build(case: dict[str, Any], directory: Path, seed: int = 0) -> Any:
    """Writes the checkpoint of a case and returns the torch model.

    Weights have unit gain, and norms and biases are moved off their initial values, so that each
    of them shows in the logits.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        settings = {**COMMON, **case}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        model.save_pretrained(directory)
    return model


@functools.cache
def checkpoint(name: str) -> tuple[Path, Any]:
    """Directory and torch model of a case of CASES, made once a test session."""
    directory = Path(tempfile.mkdtemp(prefix=f"kvjax-{name}-"))
    return directory, build(CASES[name], directory)


def torch_logits(model: Any, tokens: Any) -> Any:
    """Logits [B, T, V] of the torch model, as a numpy array."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor(tokens)).logits.float().numpy()


def torch_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens of the torch model, by its own generate."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()
