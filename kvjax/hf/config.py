"""Hugging Face config.json → ModelConfig."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.config import ModelConfig
from kvjax.hf.families import FAMILIES

Raw = Mapping[str, Any]
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def config_from_hf(raw: Raw, generation_config: Raw | None = None) -> ModelConfig:
    """The model that a Hugging Face config describes.

    Args:
        raw: the content of config.json, of transformers 4 or 5.
        generation_config: the content of generation_config.json, whose EOS ids come first.

    Raises:
        ValueError: an unsupported model_type (the message names the supported ones) or feature,
            missing keys.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type is {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}"
        )
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise ValueError(f"the config has no {', '.join(missing)}")
    family = FAMILIES[model_type]
    config = family.build({**family.defaults, **raw})
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"the checkpoint is quantized ({method}), expected plain weights")
    eos = (generation_config or {}).get("eos_token_id")
    return dataclasses.replace(
        config,
        bos_id=raw.get("bos_token_id"),
        eos_ids=_ids(raw.get("eos_token_id") if eos is None else eos),
        hf_json=json.dumps(raw, indent=2) + "\n",
    )


def read_config(directory: Path) -> ModelConfig:
    """`config_from_hf` of a checkpoint directory, with config.json kept verbatim.

    Raises:
        ValueError: no config.json, one that is no JSON object, or what `config_from_hf` raises.
    """
    text, raw = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    generation_config = _read_json(generation)[1] if generation.is_file() else None
    return dataclasses.replace(config_from_hf(raw, generation_config), hf_json=text)


def _read_json(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    text = path.read_text(encoding="utf-8")
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, expected an object")
    return text, raw


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
