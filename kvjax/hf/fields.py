"""The valid values of each key of a Hugging Face config.

One table has the kinds of all values, and one error lists all violations. The kinds follow the
types of transformers' config classes: a count is an integer and nothing else, and null is allowed
where the class allows None. Real numbers may be written as integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.checkpoint_files import shown

Raw = Mapping[str, Any]

LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of the activation functions → ours."""
LARGEST = 2**31 - 1
LARGEST_REAL = 1e30
MAX_LAYERS = 10_000
DEFAULT_EXPERTS = 128  # of Qwen 3, which has two names for their number


Check = tuple[tuple[str, ...], Callable[[Raw], Iterable[str]]]
"""The keys that a check between keys reads, and the check: it yields a line for each problem."""


@dataclass(frozen=True)
class Kind:
    """A kind of value: `expected` describes its valid values, `accepts` tests a value."""

    expected: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def count(low: int = 1, high: int = LARGEST) -> Kind:
    """An integer within bounds."""
    return Kind(f"an integer from {low} to {high}", lambda value: _is_int(value, low, high))


def real(low: float, high: float = LARGEST_REAL, *, above: bool = False) -> Kind:
    """A finite number within bounds; `above` excludes the lower one."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return low <= value <= high and not (above and value == low)

    start = f"above {low:g}" if above else f"of at least {low:g}"
    return Kind(f"a number {start}" + (f", at most {high:g}" * (high < LARGEST_REAL)), accepts)


def optional(kind: Kind) -> Kind:
    """The kind, or null."""
    return Kind(f"{kind.expected} or null", lambda value: value is None or kind.accepts(value))


def listed(kind: Kind, plural: str) -> Kind:
    """A list whose entries are all of a kind."""
    return Kind(
        f"a list of {plural}",
        lambda value: isinstance(value, list | tuple) and all(map(kind.accepts, value)),
    )


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
NOTHING = Kind("no such key: kvjax reads model.safetensors or its index", lambda v: v is None)
POSITIVE = real(0.0, above=True)
TOKEN = count(-1)  # files on the hub say −1 for "none"
TOKENS = Kind(
    "a token id, a list of token ids or null",
    lambda value: optional(TOKEN).accepts(value) or listed(TOKEN, "").accepts(value),
)

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
EVERY = {
    **dict.fromkeys(REQUIRED, count()),
    "num_hidden_layers": count(high=MAX_LAYERS),
    "num_key_value_heads": optional(count()),
    "head_dim": optional(count()),
    "rms_norm_eps": real(0.0, 1.0),
    "max_position_embeddings": count(),
    "tie_word_embeddings": FLAG,
    "layer_types": optional(listed(TEXT, "texts")),
    "rope_theta": optional(POSITIVE),
    "partial_rotary_factor": optional(real(0.0, 1.0, above=True)),
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
    "bos_token_id": optional(TOKEN),
    "eos_token_id": TOKENS,
    "quantization_config": optional(OBJECT),
    "transformers_weights": NOTHING,
}
"""Keys that every family reads."""
OWN = {
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "sliding_window": optional(count()),
    "use_sliding_window": FLAG,
    "max_window_layers": count(0),
    "sliding_window_pattern": optional(count()),
    "use_bidirectional_attention": optional(FLAG),
    "query_pre_attn_scalar": POSITIVE,
    "attn_logit_softcapping": optional(POSITIVE),
    "final_logit_softcapping": optional(POSITIVE),
    "rope_local_base_freq": optional(POSITIVE),
    "original_max_position_embeddings": count(2),
    "no_rope_layers": optional(listed(count(0, 1), "0 and 1")),
    "no_rope_layer_interval": count(),
    "num_experts": optional(count()),
    "num_local_experts": optional(count()),
    "num_experts_per_tok": count(),
    "moe_intermediate_size": count(),
    "norm_topk_prob": FLAG,
    "mlp_only_layers": optional(listed(count(0), "layer numbers")),
    "decoder_sparse_step": count(),
    "first_k_dense_replace": count(0),
    "q_lora_rank": optional(count()),
    "kv_lora_rank": count(),
    "qk_nope_head_dim": count(),
    "qk_rope_head_dim": count(),
    "v_head_dim": count(),
    "rope_interleave": optional(FLAG),
}
"""Keys that a family reads only if the family has a default for them."""


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
    found = [f"the config has no {', '.join(missing)}"] if missing else []
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


def violations(raw: Raw, table: Mapping[str, Kind], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key whose value the table does not accept, with a line that says so."""
    for key, kind in table.items():
        if key in raw and not kind.accepts(raw[key]):
            yield key, f"{prefix}{key} is {shown(raw[key])}, expected {kind.expected}"


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
