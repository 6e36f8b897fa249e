"""RoPE settings of a Hugging Face config, in the old style and the one of transformers 5."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

Raw = Mapping[str, Any]


def rope_config(
    raw: Raw, head_dim: int, theta: float, layer_type: str | None = None, interleaved: bool = False
) -> RopeConfig:
    """The rotary embedding that a config asks for.

    Args:
        raw: config.json, with `rope_theta` and `rope_scaling` or with `rope_parameters`.
        head_dim: H, of which `partial_rotary_factor` may leave a part unrotated.
        theta: the family's base where the config has none.
        layer_type: which entry of nested `rope_parameters` counts.
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
"""Kind → the numbers that it cannot do without, and its constructor."""
