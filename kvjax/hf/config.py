"""config.json of a Hugging Face checkpoint → ModelConfig."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checkpoint_files import PIECE_BYTES, scan
from kvjax.config import ModelConfig
from kvjax.fields import refuse, shown, violations, within
from kvjax.hf import fields
from kvjax.hf.families import FAMILIES
from kvjax.hf.layout import EMBEDDING, HEAD, canonical
from kvjax.hf.rope import ROPE_CHECKS
from kvjax.nn import Transformer
from kvjax.text_files import read_object, read_text

Raw = Mapping[str, Any]
CHECKS = (*fields.CHECKS, *ROPE_CHECKS)
GENERATION = "generation_config.json"


def config_from_hf(raw: Raw, generation_config: Raw | None = None) -> ModelConfig:
    """The model that a Hugging Face config describes.

    Args:
        raw: the content of config.json, of transformers 4 or 5.
        generation_config: the content of generation_config.json, whose EOS ids come first.

    Raises:
        ValueError: the model_type or a feature is unsupported, or keys are missing or have
            invalid values. One error lists every such key.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"the config is {shown(raw)}, expected an object")
    refuse([*_problems(raw), *_generation_problems(generation_config, GENERATION)])
    family = FAMILIES[raw["model_type"]]
    config = family.build(fields.merged(raw, family.defaults))
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise ValueError(f"the checkpoint is quantized ({method}), expected plain weights")
    # transformers' generate ends texts by generation_config.json, if it has ids.
    eos = (generation_config or {}).get("eos_token_id")
    return dataclasses.replace(
        config,
        bos_id=raw.get("bos_token_id"),
        eos_ids=_ids(raw.get("eos_token_id") if eos is None else eos),
        hf_json=json.dumps(raw, indent=2) + "\n",
    )


def _problems(raw: Raw) -> list[str]:
    """A line for each field of config.json that kvjax cannot read."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return [f"model_type is {shown(model_type)}, expected one of {known}"]
    return fields.problems(fields.merged(raw, FAMILIES[model_type].defaults), CHECKS)


def _generation_problems(raw: Raw | None, name: Any) -> list[str]:
    return [line for _, line in violations(raw or {}, fields.GENERATION, f"{name}: ")]


def read_config(directory: Path) -> ModelConfig:
    """`config_from_hf` of a checkpoint directory, with config.json kept verbatim.

    Raises:
        ValueError: config.json is missing or holds no JSON object, or see
            `config_from_hf`.
    """
    path, generation = directory / "config.json", directory / GENERATION
    raw = read_object(path)
    generation_config = read_object(generation) if generation.is_file() else None
    problems = [f"{path}: {line}" for line in _problems(raw)]
    refuse([*problems, *_generation_problems(generation_config, generation)])
    with within(path):  # the family may refuse values that fit their types
        config = config_from_hf(raw, generation_config)
    return dataclasses.replace(config, hf_json=read_text(path))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def as_stored(config: ModelConfig, directory: Path) -> ModelConfig:
    """The config, with `tie_embeddings` False if the checkpoint has a different output matrix.

    transformers does the same. A later save writes tie_word_embeddings = false too.
    """
    return _untied(config) if config.tie_embeddings and _differ(directory) else config


def matching(model: Transformer, params: Mapping[str, Any]) -> Transformer:
    """The model, with `tie_embeddings` False if its parameters have an output matrix "lm_head".

    Use it for a model that was read without its weights, when the matrices could not be compared.
    """
    if not model.config.tie_embeddings or "lm_head" not in params:
        return model
    return Transformer(_untied(model.config))


def _untied(config: ModelConfig) -> ModelConfig:
    raw = json.loads(config.hf_json) | {"tie_word_embeddings": False}
    text = json.dumps(raw, indent=2) + "\n"
    return dataclasses.replace(config, tie_embeddings=False, hf_json=text)


def _differ(directory: Path) -> bool:
    """Whether a checkpoint has both matrices, with different numbers. No other tensor is read."""
    try:
        found = scan(directory)
    except ValueError:  # missing or damaged weights: loading reports them
        return False
    found = found.renamed(functools.partial(canonical, expected={EMBEDDING, HEAD}))
    if not {EMBEDDING, HEAD} <= found.tensors.keys():
        return False
    a, b = found.open(EMBEDDING), found.open(HEAD)
    if a.shape != b.shape or a.ndim == 0:
        return True
    # Compare a few rows at a time and release their pages: the matrices may take gigabytes.
    rows = max(1, PIECE_BYTES // max(1, a[:1].nbytes))
    for start in range(0, len(a), rows):
        if not _equal(a[start : start + rows], b[start : start + rows]):
            return True
        found.release()
    return False


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same numbers; their dtypes may differ."""
    if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
        return True
    return np.array_equal(a.astype(np.float64), b.astype(np.float64))
