"""What an engine reads beside config.json and weights: generation defaults, tokenizer, a notice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.config import ModelConfig
from kvjax.hf.companions import copy_companions

GENERATION = "generation_config.json"
NOTICE = "KVJAX_NOTICE.md"
OF_ITS_WRITER = ("transformers_version", "_from_model_config")
"""Keys that say how a generation_config.json came to be, not how to generate."""

NEEDS = {
    "attention_bias": "Its kv_a_proj_with_mqa and o_proj have biases, and q_a_proj may have one. "
    "Engines without such parameters write wrong text, some of them without an error.",
    "rope_parameters": "Its rotary frequencies follow `rope_parameters`. Engines that take them "
    "for others, such as YaRN's, write wrong text without an error.",
}


def write_serving_files(source: ModelConfig, raw: Mapping[str, Any], directory: Path) -> None:
    """Completes an exported directory.

    Args:
        source: of the model that was exported; where its directory is known, the tokenizer and its
            other companions are copied from there.
        raw: the exported config.json.
    """
    # Path("") is the working directory.
    if source.source and Path(source.source).is_dir():
        copy_companions(Path(source.source), directory)
    path = directory / GENERATION
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps(generation_config(raw, kept), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    if raw.get("kvjax_requires"):
        (directory / NOTICE).write_text(notice(raw["kvjax_requires"]), encoding="utf-8")


def generation_config(raw: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of the source with the special tokens of the exported config.json.

    Args:
        raw: the exported config.json.
        kept: generation_config.json of the source, {} if there was none.
    """
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    defaults = {key: value for key, value in kept.items() if key not in OF_ITS_WRITER}
    return {**defaults, **{key: value for key, value in ids.items() if value is not None}}


def notice(requires: list[str]) -> str:
    """Why not every engine may serve a checkpoint, for those who get it without its history."""
    lines = [f"- `{key}`: {NEEDS[key]}" for key in requires]
    return (
        "# Before you serve this checkpoint\n\n"
        "Exported by kvjax: attention with latents as DeepseekV3ForCausalLM, with dense MLPs.\n"
        "`kvjax_requires` in config.json names what a loader must obey:\n\n"
        + "\n".join(lines)
        + "\n\ntransformers obeys it. docs/export.md of kvjax says what other engines do.\n"
    )
