"""The metadata of a GGUF file → the config.json that the same model has on the hub.

`kvjax.hf.families` then reads it, so one path makes the `ModelConfig` of both kinds of files. Keys
are written without the architecture: "block_count" means "llama.block_count". Numbers that no GGUF
has, such as the period of Gemma's windows, are those of llama.cpp (src/llama-model.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from kvjax.fields import Count, NotNegative, Size, Text, refuse, violations
from kvjax.hf.fields import LAYER_TYPES, MAX_LAYERS
from kvjax.hf.gguf.header import Header, Texts
from kvjax.hf.gguf.rope import rope_entries

Raw = dict[str, Any]
Metadata = Mapping[str, Any]

COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Keys that every architecture has → keys of config.json."""
REQUIRED = (
    *("context_length", "embedding_length", "feed_forward_length", "block_count"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
TYPES: dict[str, Any] = {
    **dict.fromkeys(("context_length", "embedding_length", "feed_forward_length"), Count),
    **dict.fromkeys(("block_count", "attention.head_count"), Count),
    **dict.fromkeys(("attention.head_count_kv", "attention.sliding_window"), Size),
    **dict.fromkeys(("attention.key_length", "attention.value_length"), Size),
    **dict.fromkeys(("rope.dimension_count", "rope.scaling.original_context_length"), Size),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "attention.scale"), NotNegative),
    **dict.fromkeys(("rope.freq_base", "rope.scale_linear", "rope.scaling.factor"), NotNegative),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), NotNegative),
    "rope.scaling.type": Text,
    "attention.sliding_window_pattern": Union[Size, list],  # noqa: UP007
}
"""Types of the keys that are computed with; config.json's checks see the others."""
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS_USED = {"expert_used_count": "num_experts_per_tok"}
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SILU = {"hidden_act": "silu"}
GELU = {"hidden_activation": "gelu_pytorch_tanh"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # 1 is a softmax
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "use_parallel_residual": (False,),
}
"""Keys that change what a model computes → values that change nothing.

Other values are an error, except where the architecture reads the key."""


@dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        model_type: of config.json.
        keys: the keys beyond `COMMON` that it reads → keys of config.json.
        fixed: entries of config.json that a GGUF need not state.
        variants: (key, model_type) pairs: the first key with a value other than 0 gives the type.
        permuted: the rows of q and k alternate between the two halves of a head, because the
            published Llama rotates neighbours. Hugging Face's models have one half after the other.
        norm_offset: the converter added this number to the weights of all norms.
        period: every `period`-th layer has no sliding window; 0 if all layers are the same.
        query_scalar: config.json has a query_pre_attn_scalar.
        scaled_by_width: the scalar is D / N for models with these numbers of layers, otherwise H.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=lambda: SILU)
    variants: tuple[tuple[str, str], ...] = ()
    permuted: bool = False
    norm_offset: float = 0.0
    period: int = 0
    query_scalar: bool = False
    scaled_by_width: tuple[int, ...] = ()


QWEN = {**SILU, "use_sliding_window": False}
ARCHITECTURES = {
    "llama": Architecture(
        "llama",
        {"expert_count": "num_local_experts", **EXPERTS_USED, **WINDOW},
        variants=(("expert_count", "mixtral"), ("attention.sliding_window", "mistral")),
        permuted=True,
    ),
    "qwen2": Architecture("qwen2", fixed=QWEN),
    "qwen3": Architecture("qwen3", fixed=QWEN),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {
            "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            **EXPERTS_USED,
        },
        {**QWEN, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "gemma2": Architecture(
        "gemma2",
        {**WINDOW, **SOFTCAPS},
        GELU,
        norm_offset=1.0,
        period=2,
        query_scalar=True,
        scaled_by_width=(46,),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        {**WINDOW, **SOFTCAPS, "rope.freq_base_swa": "rope_local_base_freq"},
        {**GELU, "rope_local_base_freq": 10_000.0},
        norm_offset=1.0,
        period=6,
        query_scalar=True,
        scaled_by_width=(62,),
    ),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", WINDOW),
}
"""general.architecture → how to read it."""
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""model_type → transformers' class, which serving engines look for in config.json."""

ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_WORDS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
}
"""Tokens that end an answer, in whatever model; llama.cpp knows them by their text too."""


def architecture(header: Header) -> Architecture:
    """How to read a file.

    Raises:
        ValueError: kvjax does not know the architecture.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        expected = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"general.architecture is {name!r}, expected one of {expected}")
    return ARCHITECTURES[name]


def hf_config(header: Header) -> Raw:
    """The config.json of the model in a GGUF file.

    Raises:
        ValueError: an unknown architecture, missing keys, or keys with a meaning that kvjax does
            not compute.
    """
    rules = architecture(header)
    name = f"{header.metadata['general.architecture']}."
    values = {
        key.removeprefix(name): value
        for key, value in header.metadata.items()
        if key.startswith(name)
    }
    values |= {key: _common(f"{name}{key}", values[key]) for key in COMMON if key in values}
    _check(values, rules, name)
    if "token_embd.weight" not in header.tensors:
        raise ValueError("missing token_embd.weight")
    known = COMMON | dict(rules.keys)
    raw = {**rules.fixed, **{known[key]: values[key] for key in known if values.get(key)}}
    variants = (model_type for key, model_type in rules.variants if values.get(key))
    raw["model_type"] = next(variants, rules.model_type)
    raw["architectures"] = [CLASSES[raw["model_type"]]]
    raw["dtype"] = "float32"
    raw["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    raw["tie_word_embeddings"] = "output.weight" not in header.tensors
    raw["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
    raw["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    heads = values["attention.head_count"]
    H = raw.setdefault("head_dim", values["embedding_length"] // max(1, heads))
    raw |= rope_entries(values, header, H)
    raw |= _windows(values, rules) | _query_scalar(values, rules, H)
    return raw | special_ids(header.metadata)


def _common(key: str, value: Any) -> Any:
    """The one value of a key that may have one for each layer."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key} differs between layers, expected one number")
    return value[0]


def _check(values: Metadata, rules: Architecture, name: str) -> None:
    """Raises ValueError for missing keys, and for keys that change the model and are not read."""
    missing = [f"{name}{key}" for key in REQUIRED if not isinstance(values.get(key), int | float)]
    if missing:
        raise ValueError(f"the metadata has no number for {', '.join(missing)}")
    refuse(line for _, line in violations(values, TYPES, name))
    if values["block_count"] > MAX_LAYERS:  # before a list of that length is made
        got = values["block_count"]
        raise ValueError(f"{name}block_count is {got}, expected at most {MAX_LAYERS}")
    strange = [
        f"{name}{key} is {values[key]!r}, expected {' or '.join(map(repr, neutral))} for "
        f"{rules.model_type}"
        for key, neutral in NEUTRAL.items()
        if key in values and key not in rules.keys and values[key] not in neutral
    ]
    lengths = [values.get(f"attention.{part}_length") for part in ("key", "value")]
    if all(lengths) and lengths[0] != lengths[1]:
        strange.append(f"keys have {lengths[0]} numbers and values {lengths[1]}, expected as many")
    if strange:
        raise ValueError("; ".join(strange))


def _windows(values: Metadata, rules: Architecture) -> Raw:
    """`layer_types`, where layers with and without a sliding window alternate."""
    if not rules.period:
        return {}
    pattern = values.get("attention.sliding_window_pattern") or rules.period
    layers = range(values["block_count"])
    slides = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in layers]
    return {"layer_types": [LAYER_TYPES[bool(slide)] for slide in slides]}


def _query_scalar(values: Metadata, rules: Architecture, head_dim: int) -> Raw:
    """`query_pre_attn_scalar`, which files need not state: the size of the model decides."""
    if not rules.query_scalar:
        return {}
    if values.get("attention.scale"):
        return {"query_pre_attn_scalar": values["attention.scale"] ** -2}
    width = values["embedding_length"] / values["attention.head_count"]
    wide = values["block_count"] in rules.scaled_by_width
    return {"query_pre_attn_scalar": width if wide else head_dim}


def special_ids(metadata: Metadata) -> Raw:
    """The ids that begin, pad and end texts: all that end an answer, those of the file first."""
    ids = {
        key: metadata.get(f"tokenizer.ggml.{name}_token_id")
        for key, name in (("bos_token_id", "bos"), ("pad_token_id", "padding"))
    }
    ends = [metadata.get(f"tokenizer.ggml.{key}") for key in ENDS]
    words = metadata.get("tokenizer.ggml.tokens")
    if isinstance(words, Texts):
        ends += [index for index, word in enumerate(words) if word in END_WORDS]
    eos = list(dict.fromkeys(index for index in ends if index is not None))
    found = ids | {"eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    return {key: value for key, value in found.items() if value is not None}
