"""What the numbers of a Hugging Face config's RoPE must be, and how they must fit the heads."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvjax.hf.fields import (
    FLAG,
    LAYER_TYPES,
    POSITIVE,
    TEXT,
    Check,
    Raw,
    count,
    listed,
    optional,
    real,
    shown,
    violations,
)
from kvjax.hf.rope import SCALINGS, rope_kind

FACTORS = optional(listed(POSITIVE, "positive numbers"))
FIELDS = {
    "rope_type": optional(TEXT),
    "type": optional(TEXT),
    "rope_theta": optional(POSITIVE),
    "partial_rotary_factor": optional(real(0.0, 1.0, above=True)),
    "factor": optional(real(0.0, 1e6, above=True)),
    "low_freq_factor": optional(POSITIVE),
    "high_freq_factor": optional(POSITIVE),
    "original_max_position_embeddings": optional(count(2)),
    "attention_factor": optional(POSITIVE),
    "beta_fast": optional(POSITIVE),
    "beta_slow": optional(POSITIVE),
    "mscale": optional(real(0.0)),
    "mscale_all_dim": optional(real(0.0)),
    "truncate": FLAG,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
}
PER_LAYER_TYPE = "gemma3_text"  # the one family whose kinds of layers have a RoPE each
PARTIAL = "phi3"  # the one family that leaves a part of a head unrotated


def _entries(raw: Raw) -> Iterator[tuple[str, Any]]:
    """Where the config keeps its RoPE, and what is there: one object, or one a kind of layer."""
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
    """What a family's RoPE cannot be."""
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
    """Numbers that are each of the right kind but do not fit each other or the heads."""
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
