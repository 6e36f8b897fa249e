"""RoPE settings of a Hugging Face config, in the old style and the style of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from kvjax.checks import Range
from kvjax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from kvjax.fields import Flag, NotNegative, Positive, Says, Text, or_null, shown, violations
from kvjax.hf.fields import LAYER_TYPES, OWN, Check, Part, Raw


def rope_config(
    raw: Raw, head_dim: int, theta: float, layer_type: str | None = None, interleaved: bool = False
) -> RopeConfig:
    """The rotary embedding that a config asks for.

    Args:
        raw: config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.
        head_dim: H, of which `partial_rotary_factor` may leave a part unrotated.
        theta: the family's base, for a config without one.
        layer_type: the entry to read where `rope_parameters` has one for each kind of layer.
        interleaved: see `RopeConfig`.
    """
    settings = rope_settings(raw, layer_type)
    partial = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    return RopeConfig(
        dim=int(head_dim * partial),
        theta=float(settings.get("rope_theta") or raw.get("rope_theta") or theta),
        scaling=rope_scaling(settings, raw),
        interleaved=interleaved,
    )


def rope_settings(raw: Raw, layer_type: str | None = None) -> Raw:
    """The dict that holds `rope_type` and its numbers, whatever the style; empty for none."""
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if layer_type in settings:
        settings = settings[layer_type]
    return settings or {}


def rope_scaling(settings: Raw, raw: Raw) -> RopeScaling | None:
    """The scaling rule of one RoPE dict; `raw` holds the context lengths."""
    return SCALINGS[rope_kind(settings)][1](settings, raw)


def rope_kind(settings: Raw) -> str:
    """The kind of scaling that a RoPE dict names: one of `SCALINGS`, once it was checked."""
    if settings.get("short_factor") is not None:
        return "longrope"  # early Phi-3 files say "su" or "yarn"
    return settings.get("rope_type") or settings.get("type") or "default"


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of the attention logits with the context (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _original_length(settings: Raw, raw: Raw) -> int:
    # Phi-3 keeps the length outside of the RoPE dict, and that one counts; others have no such key.
    keys = "original_max_position_embeddings"
    return int(raw.get(keys) or settings.get(keys) or raw["max_position_embeddings"])


def _linear(settings: Raw, raw: Raw) -> RopeScaling:
    return LinearScaling(float(settings["factor"]))


def _dynamic(settings: Raw, raw: Raw) -> RopeScaling:
    return DynamicScaling(float(settings["factor"]), int(raw["max_position_embeddings"]))


def _llama3(settings: Raw, raw: Raw) -> RopeScaling:
    return Llama3Scaling(
        factor=float(settings["factor"]),
        low_freq_factor=float(settings["low_freq_factor"]),
        high_freq_factor=float(settings["high_freq_factor"]),
        original_length=_original_length(settings, raw),
    )


def _yarn(settings: Raw, raw: Raw) -> RopeScaling:
    original = _original_length(settings, raw)
    factor = float(settings.get("factor") or raw["max_position_embeddings"] / original)
    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
        attention_factor = yarn_mscale(factor)
        if mscale and all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return YarnScaling(
        factor=factor,
        original_length=original,
        attention_factor=float(attention_factor),
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        truncate=bool(settings.get("truncate", True)),
    )


def _longrope(settings: Raw, raw: Raw) -> RopeScaling:
    original = _original_length(settings, raw)
    factor = float(settings.get("factor") or raw["max_position_embeddings"] / original)
    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        # Phi-3: √(1 + ln(factor) / ln(original length)).
        growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + growth)
    return LongRopeScaling(
        short_factor=tuple(float(x) for x in settings["short_factor"]),
        long_factor=tuple(float(x) for x in settings["long_factor"]),
        original_length=original,
        attention_factor=float(attention_factor),
    )


SCALINGS: dict[str, tuple[tuple[str, ...], Callable[[Raw, Raw], RopeScaling | None]]] = {
    "default": ((), lambda settings, raw: None),
    "linear": (("factor",), _linear),
    "dynamic": (("factor",), _dynamic),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": ((), _yarn),
    "longrope": (("short_factor", "long_factor"), _longrope),
}
"""Kind → its required numbers, and its constructor."""


Factors = Annotated[list[Positive] | None, Says("a list of positive numbers or null")]
FIELDS: dict[str, Any] = {
    "rope_type": or_null(Text),
    "type": or_null(Text),
    "rope_theta": or_null(Positive),
    "partial_rotary_factor": or_null(Part),
    "factor": or_null(Annotated[float, Range(above=0, most=1e6)]),
    "low_freq_factor": or_null(Positive),
    "high_freq_factor": or_null(Positive),
    "original_max_position_embeddings": or_null(OWN["original_max_position_embeddings"]),
    "attention_factor": or_null(Positive),
    "beta_fast": or_null(Positive),
    "beta_slow": or_null(Positive),
    "mscale": or_null(NotNegative),
    "mscale_all_dim": or_null(NotNegative),
    "truncate": Flag,
    "short_factor": Factors,
    "long_factor": Factors,
}
PER_LAYER_TYPE = "gemma3_text"  # the one family whose kinds of layers have a RoPE each
PARTIAL = "phi3"  # the one family that leaves a part of a head unrotated


def _entries(raw: Raw) -> Iterator[tuple[str, Any]]:
    """The place and the content of each RoPE object: one, or one for each kind of layer."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    settings = raw.get(key) or {}
    nested = [kind for kind in LAYER_TYPES if kind in settings]
    if not nested or raw["model_type"] != PER_LAYER_TYPE:
        yield key, settings
    for kind in nested if raw["model_type"] == PER_LAYER_TYPE else ():
        yield f"{key}.{kind}", settings[kind] if settings[kind] is not None else {}


def _kinds(raw: Raw) -> Iterator[str]:
    """Numbers of the wrong kind, unknown types, and types whose numbers are missing."""
    for place, settings in _entries(raw):
        if not isinstance(settings, Mapping):
            yield f"{place} is {shown(settings)}, expected an object"
            continue
        wrong = list(violations(settings, FIELDS, f"{place}."))
        yield from (line for _, line in wrong)
        if {"rope_type", "type"}.intersection(key for key, _ in wrong):
            continue
        kind = rope_kind(settings)
        if kind not in SCALINGS:
            yield f"rope type is {shown(kind)}, expected one of {', '.join(SCALINGS)}"
            continue
        missing = [key for key in SCALINGS[kind][0] if settings.get(key) is None]
        if missing:
            yield f"rope type {kind!r} needs {', '.join(missing)}"


def _family(raw: Raw) -> Iterator[str]:
    """RoPE settings that the family's model does not have."""
    family = raw["model_type"]
    settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    nested = [kind for kind in LAYER_TYPES if kind in settings]
    if nested and family != PER_LAYER_TYPE:
        yield f"the RoPE has an entry for {nested[0]!r}, expected one for all layers of {family}"
    if family == PER_LAYER_TYPE and not raw.get("rope_scaling") and settings and not nested:
        yield "rope_parameters has no entry for 'full_attention' or 'sliding_attention'"
    if family == PARTIAL and not nested and _text_kind(settings) not in ("default", "longrope"):
        yield f"rope type is {shown(rope_kind(settings))}, expected longrope for {family}"
    for place, entry in (("", raw), ("RoPE's ", settings)):
        if family != PARTIAL and entry.get("partial_rotary_factor") not in (None, 1):
            part = shown(entry["partial_rotary_factor"])
            yield f"the {place}partial_rotary_factor is {part}, expected 1 for {family}"


def _text_kind(settings: Raw) -> str:
    kind = rope_kind(settings)
    return kind if isinstance(kind, str) and kind in SCALINGS else "default"  # reported by `_kinds`


def _numbers(raw: Raw) -> Iterator[str]:
    """Valid numbers that do not fit each other or the heads."""
    # The checks below read numbers that these two have found valid.
    if any(True for _ in _kinds(raw)) or any(True for _ in _family(raw)):
        return
    for place, settings in _entries(raw):
        kind, dim = rope_kind(settings), rotary_dim(raw, settings)
        if dim < 2 or dim % 2:
            yield f"RoPE would rotate {dim} components of a head, expected an even number"
        if kind == "dynamic" and dim == 2:
            yield "rope type 'dynamic' needs more than 2 rotated components of a head"
        theta = settings.get("rope_theta") or raw.get("rope_theta")
        if kind == "yarn" and theta is not None and theta <= 1:
            yield f"rope_theta is {shown(theta)}, expected more than 1 for yarn"
        if kind == "llama3" and settings["high_freq_factor"] <= settings["low_freq_factor"]:
            got = settings["low_freq_factor"], settings["high_freq_factor"]
            yield f"{place} has low_freq_factor and high_freq_factor {got}, expected them to rise"
        for name in ("short_factor", "long_factor") if kind == "longrope" else ():
            if len(settings[name]) != dim // 2:
                got = len(settings[name])
                yield f"{place}.{name} has {got} entries, expected {dim // 2}, half of {dim}"


def rotary_dim(raw: Raw, settings: Raw) -> int:
    """How many components of a head rotate."""
    head = raw.get("qk_rope_head_dim") or raw.get("head_dim")
    head = head or raw["hidden_size"] // raw["num_attention_heads"]
    own = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return int(head * (own or 1.0))


ROPE = ("rope_scaling", "rope_parameters")
HEADS = ("hidden_size", "num_attention_heads", "head_dim", "qk_rope_head_dim")
ROPE_CHECKS: tuple[Check, ...] = (
    (ROPE, _kinds),
    ((*ROPE, "partial_rotary_factor"), _family),
    ((*ROPE, *HEADS, "partial_rotary_factor", "rope_theta", "max_position_embeddings"), _numbers),
)
"""As `kvjax.hf.fields.CHECKS`."""
