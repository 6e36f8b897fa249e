"""The RoPE of a GGUF file, from its metadata and its tensors of frequency factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvjax.hf.gguf.header import Header, Place
from kvjax.hf.rope import yarn_mscale

Raw = dict[str, Any]
Metadata = Mapping[str, Any]

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors [R/2] that the rotary frequencies are divided by; the last two where the prompt is longer
than the original context, and where it is not."""
PLAIN = {0: np.float32, 1: np.float16}
ORIGINAL = "original_max_position_embeddings"
THETA = 10_000.0
"""llama.cpp's base for files without one."""


def rope_entries(values: Metadata, header: Header, head_dim: int) -> Raw:
    """The entries of config.json about RoPE.

    Args:
        values: metadata without the architecture's name.
        head_dim: H.

    Raises:
        ValueError: an unknown scaling, or missing numbers.
    """
    theta = float(values.get("rope.freq_base", THETA))
    width = values.get("rope.dimension_count") or head_dim
    entries: Raw = {"rope_theta": theta}
    if width != head_dim:
        entries["partial_rotary_factor"] = _share(width, head_dim)
    scaling = _from_tensors(values, header, theta, width) or _from_metadata(values)
    if scaling:
        entries["rope_scaling"] = scaling
        # Phi 3 has this length outside of the RoPE settings.
        entries |= {ORIGINAL: scaling[ORIGINAL]} if scaling["rope_type"] == "longrope" else {}
    return entries


def _share(width: int, head_dim: int) -> float:
    """width / head_dim, rounded so that a reader who truncates the product gets `width`."""
    share = width / head_dim
    return share if int(head_dim * share) == width else math.nextafter(share, math.inf)


def _from_metadata(values: Metadata) -> Raw | None:
    """The scaling that the metadata names; None for none."""
    kind = values.get("rope.scaling.type", "none")
    if kind == "none" and values.get("rope.scale_linear", 1.0) != 1.0:
        return {"rope_type": "linear", "factor": values["rope.scale_linear"]}  # old files
    if kind not in KINDS:
        raise ValueError(f"rope.scaling.type is {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind](values)


def _factor(values: Metadata) -> float:
    factor = values.get("rope.scaling.factor")
    if not factor:
        kind = values["rope.scaling.type"]
        raise ValueError(f"rope.scaling.type is {kind!r}, and there is no rope.scaling.factor")
    return float(factor)


def _linear(values: Metadata) -> Raw:
    return {"rope_type": "linear", "factor": _factor(values)}


def _yarn(values: Metadata) -> Raw:
    factor = _factor(values)
    more = {
        "beta_fast": values.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": values.get("rope.scaling.yarn_beta_slow"),
        ORIGINAL: values.get("rope.scaling.original_context_length"),
    }
    # llama.cpp multiplies YaRN's own growth of the logits by this number.
    growth = values.get("rope.scaling.yarn_attn_factor") or values.get("rope.scaling.attn_factor")
    if growth not in (None, 1.0):
        more["attention_factor"] = growth * yarn_mscale(factor)
    return {"rope_type": "yarn", "factor": factor, **{k: v for k, v in more.items() if v}}


def _longrope(values: Metadata) -> Raw:
    raise ValueError(f"rope.scaling.type is 'longrope', and there is no {LONG} or {SHORT}")


KINDS: dict[str, Callable[[Metadata], Raw | None]] = {
    "none": lambda values: None,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


# --- Factors in tensors --------------------------------------------------------------------------


def _from_tensors(values: Metadata, header: Header, theta: float, width: int) -> Raw | None:
    """The scaling that the factors of the frequencies are of; None for a file without any."""
    held = header.tensors
    if {LONG, SHORT} <= held.keys():
        original = values.get("rope.scaling.original_context_length") or values["context_length"]
        growth = values.get("rope.scaling.attn_factor", 1.0)
        return _as_longrope(_read(held[SHORT]), _read(held[LONG]), original, growth)
    if FACTORS not in held:
        return None
    factors = _read(held[FACTORS])
    frequencies = theta ** -(np.arange(0, width, 2) / width)
    if factors.shape != frequencies.shape:
        got, expected = factors.shape, frequencies.shape
        raise ValueError(f"{FACTORS} has shape {got}, expected {expected}")
    if (factors == 1).all():
        return None
    same = _as_longrope(factors, factors, values["context_length"], 1.0)
    return as_llama3(factors, frequencies) or same


def _as_longrope(short: np.ndarray, long: np.ndarray, original: int, growth: float) -> Raw:
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "attention_factor": float(growth),
        ORIGINAL: original,
    }


def as_llama3(factors: np.ndarray, frequencies: np.ndarray) -> Raw | None:
    """The settings of Llama 3.1's scaling that give these factors; None if there are none.

    That rule divides slow frequencies by `factor`, leaves fast ones, and blends in between: the
    share of the undivided frequency is s = (c − low) / (high − low), c = original length / wave
    length. So s is a line over 1 / wave length, and two frequencies on it give low, high and
    length up to a common factor, chosen so that low is 1.

    Args:
        factors: [R/2], the undivided frequency over the model's.
        frequencies: [R/2], undivided.
    """
    most = factors.max()
    blended = (factors > 1 + 1e-4) & (factors < most * (1 - 1e-4))
    if blended.sum() < 2:
        return None
    share = (1 / factors - 1 / most) / (1 - 1 / most)
    slope, start = np.polyfit(frequencies[blended] / (2 * np.pi), share[blended], 1)
    if start >= 0:  # it is −low / (high − low)
        return None
    high = 1 - 1 / start
    low, high, original = 1.0, round(high, 3), round(slope * (high - 1))
    if high <= low or original < 2:
        return None
    ideal = np.clip((frequencies / (2 * np.pi) * original - low) / (high - low), 0, 1)
    if not np.allclose(1 / factors, ideal + (1 - ideal) / most, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(float(most), 6),
        "low_freq_factor": low,
        "high_freq_factor": high,
        ORIGINAL: original,
    }


def _read(place: Place) -> np.ndarray:
    """The numbers of a small tensor in float64."""
    if place.kind not in PLAIN:
        raise ValueError("the factors of the rotary frequencies are quantized, expected F32")
    count = int(np.prod(place.shape))
    stored = np.fromfile(place.path, PLAIN[place.kind], count, offset=place.start)
    return stored.astype(np.float64).reshape(place.shape)
