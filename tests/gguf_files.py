"""Tiny GGUF files, written with the gguf package from Hugging Face configs and tensors.

Names come from the package's own map. What llama.cpp's converter changes in the values is done here
once more, in another way than kvjax undoes it.
"""

import math
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from kvjax.hf import config_from_hf
from kvjax.hf.layout import layouts, tensors
from kvjax.nn import param_shapes

ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""model_type → general.architecture, where they differ."""
PERMUTED = ("llama", "smollm3")
SCALES = {
    **{"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)},
    **{"IQ2_XXS": (0, 2), "IQ2_XS": (0, 2), "IQ2_S": (0, 2), "IQ3_XXS": (0, 2), "IQ3_S": (0, 2)},
    **{"IQ4_XS": (0, 2), "IQ1_S": (0, 2), "MXFP4": (0, 0)},
}
"""Kinds that the package only reads → the bytes of a block that hold its float16 scales."""
COMMON = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 7}
EXPERTS = {"num_experts_per_tok": 2}
CASES = {
    "llama": {"tie_word_embeddings": True},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **EXPERTS},
    "qwen2": {
        "model_type": "qwen2",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        **EXPERTS,
    },
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16,
        **GEMMA,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 16,
        **GEMMA,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "phi3": {
        "model_type": "phi3",
        "sliding_window": 9,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.25, 1.5, 2.0],
            "long_factor": [2.0, 6.0, 8.0, 9.0],
            "attention_factor": 1.25,
            "original_max_position_embeddings": 16,
        },
    },
}
"""Families and features → config.json beyond `COMMON`."""


def raw_config(name, **changes):
    """config.json of a case."""
    return {**COMMON, **CASES[name], **changes}


def hf_tensors(raw, seed=0):
    """Random tensors by Hugging Face's names, for a config."""
    config, rng = config_from_hf(raw), np.random.default_rng(seed)
    shapes = _flat(param_shapes(config))
    named = tensors(config, {path: leaf.shape for path, leaf in shapes.items()}, layouts(config)[0])
    # 16 bits of mantissa: 1 can be added to a norm and taken away without a change.
    return {
        t.name: np.round(rng.normal(size=t.shape) * 2**12).astype(np.float32) / 2**14 for t in named
    }


def _flat(tree, path=()):
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        key: leaf for name, sub in tree.items() for key, leaf in _flat(sub, (*path, name)).items()
    }


def write(path, raw, named, kinds=lambda name: "F32", pieces=0, extra=None, skip=()):
    """Writes a model.

    Args:
        raw: config.json.
        named: tensors by Hugging Face's names.
        kinds: the quantization of each tensor, by its GGUF name.
        pieces: tensors in each piece of a file that is split; 0 for one file.
        extra: (writer) → None, adds metadata.
        skip: GGUF names of tensors to leave out.
    """
    arch = ARCHITECTURES.get(raw["model_type"], raw["model_type"])
    writer = GGUFWriter(path, arch, split_max_tensors=pieces)
    add_metadata(writer, raw)
    if extra is not None:
        extra(writer)
    for name, values in {**gguf_tensors(raw, named, arch), **factor_tensors(raw)}.items():
        if name in skip:
            continue
        kind = GGMLQuantizationType[kinds(name) if values.ndim > 1 else "F32"]
        writer.add_tensor(name, quantized(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(values, kind, seed=0):
    """The values in blocks; random blocks for kinds that the package cannot write."""
    if kind.name not in SCALES:
        return gguf.quantize(np.ascontiguousarray(values), kind)
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 128, (values.size // block, size), dtype=np.uint8)
    first, last = SCALES[kind.name]
    scales = rng.uniform(1e-4, 1e-3, (len(blocks), (last - first) // 2)).astype(np.float16)
    blocks[:, first:last] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def gguf_tensors(raw, named, arch):
    """The tensors with the names and the values that llama.cpp's converter gives them."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, raw["num_hidden_layers"])
    found = {}
    for name, values in with_stacked_experts(named).items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if arch in PERMUTED and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            order = [permuted_row(row, len(values) // raw[key]) for row in range(len(values))]
            values = values[np.argsort(order)]
        if arch.startswith("gemma") and "norm" in name:
            values = values + 1
        found[new] = values
    return found


def permuted_row(row, width):
    """Where the converter puts a row of q or k: element i of a half comes to 2i or 2i + 1."""
    head, place = divmod(row, width)
    half, index = divmod(place, width // 2)
    return head * width + 2 * index + half


def with_stacked_experts(named):
    """One tensor for the experts of a layer, as files since 2024 have it."""
    found, groups = {}, {}
    for name, values in named.items():
        before, _, after = name.partition(".experts.")
        if after and after.split(".")[0].isdigit():
            groups.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(values)
        else:
            found[name] = values
    return found | {name: np.stack(group) for name, group in groups.items()}


def factor_tensors(raw):
    """Tensors of RoPE's factors, for the kinds of scaling that are stored so."""
    rope = raw.get("rope_scaling") or {}
    if rope.get("rope_type") == "longrope":
        kinds = ("short", "long")
        return {f"rope_factors_{k}.weight": np.float32(rope[f"{k}_factor"]) for k in kinds}
    if rope.get("rope_type") != "llama3":
        return {}
    low, high, factor = (rope[f"{k}factor"] for k in ("low_freq_", "high_freq_", ""))
    original, width, out = rope["original_max_position_embeddings"], raw["head_dim"], []
    for i in range(0, width, 2):
        length = 2 * math.pi * raw["rope_theta"] ** (i / width)
        if length < original / high:
            out.append(1.0)
        elif length > original / low:
            out.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.float32(out)}


def add_metadata(writer, raw):
    """What llama.cpp's converters write for the families that kvjax has."""
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    partial = raw.get("partial_rotary_factor", 1)
    writer.add_rope_dimension_count(int(raw["head_dim"] * partial))
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_bos_token_id(raw["bos_token_id"])
    writer.add_eos_token_id(raw["eos_token_id"])
    writer.add_pad_token_id(raw["pad_token_id"])
    optional = {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "num_experts": writer.add_expert_count,
        "num_local_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
    }
    for key, add in optional.items():
        if raw.get(key):
            add(raw[key])
    _add_scaling(writer, raw.get("rope_scaling") or {})


def _add_scaling(writer, rope):
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])


def folder_with(directory: Path, raw, **settings) -> Path:
    """A folder with one file of random weights; returns the file."""
    path = directory / "model.gguf"
    write(path, raw, hf_tensors(raw), **settings)
    return path
