"""What the values of a kvjax.json must be: the types that kvjax.config's dataclasses declare."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from kvjax.hf.fields import ACTIVATIONS, LARGEST_REAL, TOKEN, count, shown

COUNTS = (
    *("vocab_size", "hidden_size", "max_position_embeddings"),
    *("num_heads", "num_kv_heads", "head_dim", "window", "width", "num_experts", "top_k"),
    *("latent_heads", "key_rank", "value_rank", "rank", "kv_lora_rank", "q_lora_rank"),
    *("v_head_dim", "original_length"),
)
POSITIVE = (
    *("theta", "scale", "softcap", "final_softcap"),
    *("factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow"),
)
NAMES = {
    "activation": tuple(dict.fromkeys(ACTIVATIONS.values())),
    "qk_norm": ("head", "all"),
    "rope_site": ("after_up", "before_up"),
}
"""Fields that choose between ways to compute, and the names of these."""


def part_problems(value: Any, hint: Any, place: str = "model") -> Iterator[str]:
    """Every value below a JSON value that is not of the declared type, or means nothing.

    Args:
        hint: what the value must be: a dataclass of kvjax.config, or the type of one's field.
        place: where the value is, for the lines.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, dict):
        found = [kind for kind in kinds if getattr(kind, "__name__", "") == value.get("type")]
        if not found:
            got = shown(value.get("type"))
            yield f"{place} is an unknown part {got}, expected {_words(hint)}"
            return
        yield from _field_problems(value, found[0], place)
    elif isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        entry = next(typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is tuple)
        for index, one in enumerate(value):
            yield from part_problems(one, entry, f"{place}[{index}]")
    elif not any(_fits(value, kind) for kind in kinds):
        yield f"{place} is {shown(value)}, expected {_words(hint)}"
    elif not _means_something(name := place.rpartition(".")[2], value):
        yield f"{place} is {shown(value)}, expected {_range(name)}"


def _field_problems(value: dict[str, Any], cls: type, place: str) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for name in sorted(value.keys() - hints.keys() - {"type"}):
        yield f"{place} has an unknown field {shown(name)}"
    for field in dataclasses.fields(cls):
        if field.name in value:
            yield from part_problems(value[field.name], hints[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING:
            yield f"{place} has no {field.name}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value that is no object and no list is of a type."""
    if kind is int:
        return TOKEN.accepts(value)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= LARGEST_REAL
    return isinstance(kind, type) and isinstance(value, kind)


def _means_something(name: str, value: Any) -> bool:
    if value is None:
        return True
    if name in COUNTS:
        return count().accepts(value)
    if name == "eps":
        return 0 <= value <= 1
    if name in NAMES:
        return value in NAMES[name]
    return name not in POSITIVE or value > 0


def _range(name: str) -> str:
    if name in NAMES:
        return f"one of {', '.join(NAMES[name])}"
    return "a number from 0 to 1" if name == "eps" else "a positive number"


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_words(typing.get_args(hint)[0])}"
    return "null" if hint is types.NoneType else hint.__name__
