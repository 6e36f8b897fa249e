"""The fields of a Hugging Face config.json that kvjax reads, each with its type and range.

One error lists all violations. The types follow those of transformers' config classes: a count is
an integer and nothing else, and null is allowed where the class allows None. Real numbers may be
written as integers. All other fields are ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from kvjax.checks import COUNT, Range
from kvjax.config import Token
from kvjax.fields import (
    Count,
    Flag,
    Object,
    Positive,
    Says,
    Size,
    Text,
    or_null,
    shown,
    violations,
    words,
)

Raw = Mapping[str, Any]

LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of the activation functions → ours."""
MAX_LAYERS = 10_000
DEFAULT_EXPERTS = 128  # of Qwen 3, which has two names for their number


Check = tuple[tuple[str, ...], Callable[[Raw], Iterable[str]]]
"""The keys that a check between keys reads, and the check: it yields a line for each problem."""


Tokens = Annotated[Token | list[Token] | None, Says("a token id, a list of token ids or null")]
Part = Annotated[float, Range(above=0, most=1)]
Texts = Annotated[list[Text] | None, Says("a list of texts or null")]
Layers = Annotated[list[Size] | None, Says("a list of layer numbers or null")]
Bits = Annotated[
    list[Annotated[int, Range(0, 1, whole=True)]] | None, Says("a list of 0 and 1 or null")
]
Nothing = Annotated[None, Says("no such key: kvjax reads model.safetensors or its index")]

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
EVERY: dict[str, Any] = {
    **dict.fromkeys(REQUIRED, Count),
    "num_hidden_layers": Annotated[int, Range(least=1, most=MAX_LAYERS, whole=True)],
    "num_key_value_heads": or_null(Count),
    "head_dim": or_null(Count),
    "rms_norm_eps": Annotated[float, Range(least=0, most=1)],
    "max_position_embeddings": Count,
    "tie_word_embeddings": Flag,
    "layer_types": Texts,
    "rope_theta": or_null(Positive),
    "partial_rotary_factor": or_null(Part),
    "rope_scaling": or_null(Object),
    "rope_parameters": or_null(Object),
    "bos_token_id": or_null(Token),
    "eos_token_id": Tokens,
    "quantization_config": or_null(Object),
    "transformers_weights": Nothing,
}
"""Keys that every family reads."""
OWN: dict[str, Any] = {
    "attention_bias": Flag,
    "mlp_bias": Flag,
    "hidden_act": Text,
    "hidden_activation": Text,
    "sliding_window": or_null(Count),
    "use_sliding_window": Flag,
    "max_window_layers": Size,
    "sliding_window_pattern": or_null(Count),
    "use_bidirectional_attention": or_null(Flag),
    "query_pre_attn_scalar": Positive,
    "attn_logit_softcapping": or_null(Positive),
    "final_logit_softcapping": or_null(Positive),
    "rope_local_base_freq": or_null(Positive),
    "original_max_position_embeddings": Annotated[int, Range(2, COUNT.most, whole=True)],
    "no_rope_layers": Bits,
    "no_rope_layer_interval": Count,
    "num_experts": or_null(Count),
    "num_local_experts": or_null(Count),
    "num_experts_per_tok": Count,
    "moe_intermediate_size": Count,
    "norm_topk_prob": Flag,
    "mlp_only_layers": Layers,
    "decoder_sparse_step": Count,
    "first_k_dense_replace": Size,
    "q_lora_rank": or_null(Count),
    "kv_lora_rank": Count,
    "qk_nope_head_dim": Count,
    "qk_rope_head_dim": Count,
    "v_head_dim": Count,
    "rope_interleave": or_null(Flag),
}
"""Keys that a family reads only if the family has a default for them."""
GENERATION = {"eos_token_id": Tokens}
"""Keys of generation_config.json."""


def merged(raw: Raw, defaults: Raw) -> Raw:
    """The config over its family's defaults, without keys that only other families read."""
    return {
        key: value
        for key, value in {**defaults, **raw}.items()
        if key not in OWN or key in defaults
    }


def problems(full: Raw, checks: Sequence[Check] | None = None) -> list[str]:
    """A line for each invalid value of a config.

    Args:
        full: the result of `merged`.
        checks: checks between keys; None: `CHECKS`.
    """
    missing = [key for key in REQUIRED if full.get(key) is None]
    found = [f"{key} is missing, expected {words(EVERY[key])}" for key in missing]
    table = {key: kind for key, kind in (EVERY | OWN).items() if key not in missing}
    if not full.get("use_sliding_window", True):
        table.pop("sliding_window", None)  # as transformers, which then reads no window
    wrong = dict(violations(full, table))
    # A check between keys would repeat a problem of a key that is invalid by itself.
    named = {*missing, *wrong}
    found += wrong.values()
    for needs, check in CHECKS if checks is None else checks:
        if not named.intersection(needs):
            found += check(full)
    return found


def _heads(raw: Raw) -> Iterator[str]:
    if "kv_lora_rank" in raw:  # latent attention has no KV heads, and other head widths
        return
    D, N, K = raw["hidden_size"], raw["num_attention_heads"], raw.get("num_key_value_heads")
    if N % (K or N):
        yield f"got {N} query heads for {K} KV heads, expected a multiple"
    if not raw.get("head_dim") and D % N:
        yield f"hidden_size is {D}, expected a multiple of {N} heads where no head_dim is given"


def _layer_types(raw: Raw) -> Iterator[str]:
    kinds, layers = raw.get("layer_types"), raw["num_hidden_layers"]
    if kinds is None:
        return
    if len(kinds) != layers:
        yield f"layer_types has {len(kinds)} entries, expected {layers}, one per layer"
    expected = " or ".join(map(repr, LAYER_TYPES))
    for index, kind in enumerate(kinds):
        if kind not in LAYER_TYPES:
            yield f"layer_types: layer {index} has {shown(kind)}, expected {expected}"
            return


def _no_rope_layers(raw: Raw) -> Iterator[str]:
    rotates, layers = raw.get("no_rope_layers"), raw["num_hidden_layers"]
    if "no_rope_layer_interval" in raw and rotates is not None and len(rotates) < layers:
        yield f"no_rope_layers has {len(rotates)} entries, expected at least {layers}"


def _dense_layers(raw: Raw) -> Iterator[str]:
    layers = raw["num_hidden_layers"]
    beyond = [index for index in raw.get("mlp_only_layers") or () if index >= layers]
    if "decoder_sparse_step" in raw and beyond:
        yield f"mlp_only_layers names {shown(beyond)}, expected numbers below {layers}"


def _experts(raw: Raw) -> Iterator[str]:
    experts = raw.get("num_experts") or raw.get("num_local_experts") or DEFAULT_EXPERTS
    top = raw.get("num_experts_per_tok")
    if top and top > experts:
        yield f"num_experts_per_tok is {top}, expected at most the {experts} experts"


def _activation(raw: Raw) -> Iterator[str]:
    name = raw["hidden_activation" if "hidden_activation" in raw else "hidden_act"]
    if name not in ACTIVATIONS:
        yield f"the activation is {shown(name)}, expected one of {', '.join(ACTIVATIONS)}"


CHECKS: tuple[Check, ...] = (
    (("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"), _heads),
    (("layer_types", "num_hidden_layers"), _layer_types),
    (("no_rope_layers", "num_hidden_layers"), _no_rope_layers),
    (("mlp_only_layers", "num_hidden_layers"), _dense_layers),
    (("num_experts", "num_local_experts", "num_experts_per_tok"), _experts),
    (("hidden_act", "hidden_activation"), _activation),
)
"""Checks between keys, each with the keys that must be right before it."""
