"""Models to directories, in three layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax import processes
from kvjax.checkpoint_files import MAX_SHARD_BYTES, leftovers
from kvjax.config import ModelConfig
from kvjax.folders import whole_folder
from kvjax.hf import native, weights
from kvjax.hf.config import config_from_hf
from kvjax.hf.deepseek.export import to_deepseek
from kvjax.hf.source import PARAMS, copy_companions, is_native
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.paths import local_path
from kvjax.runs import write_json, write_whole
from kvjax.text_files import read_object

LAYOUTS = ("native", "hf", "deepseek_v3")
GENERATION = "generation_config.json"
NOTICE = "KVJAX_NOTICE.md"
WRITER_KEYS = ("transformers_version", "_from_model_config")
"""Keys about the writer of a generation_config.json; they do not affect generation."""

NEEDS = {
    "attention_bias": "Its kv_a_proj_with_mqa and o_proj have biases, and q_a_proj may have one. "
    "Engines without such parameters write wrong text, some of them without an error.",
    "rope_parameters": "Its rotary frequencies follow `rope_parameters`. Engines that take them "
    "for others, such as YaRN's, write wrong text without an error.",
}


def save(
    model: Transformer,
    params: dict[str, Any],
    path: str | Path,
    layout: str = "native",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    norm: str = "neutral",
    latent_rms: Sequence[np.ndarray] | None = None,
) -> None:
    """Writes a model to a directory that `load` reads.

    Layout "deepseek_v3" is for serving engines, which need one directory with everything: it also
    gets generation_config.json, and if `model.config.source` exists, the tokenizer, licence
    and other companion files from there. The other layouts write no tokenizer.

    With several processes (`kvjax.processes`), all call `save` with arrays on a mesh of all
    processes and a directory on a shared disk.

    Args:
        layout: "native" (orbax, any model), "hf" (safetensors and config.json, for models that
            transformers knows), or "deepseek_v3" (the same, for models of the decoupled
            conversion, which transformers loads as DeepseekV3ForCausalLM; see docs/export.md).
        max_shard_bytes: largest size of a safetensors file.
        norm, latent_rms: for "deepseek_v3" only, see `kvjax.hf.deepseek.export.to_deepseek`.

    Raises:
        ValueError: the layout is unknown or cannot express the model, the parameters are of another
            model, the path is a URL, or the path already has a checkpoint. Nothing is written then.
            With several processes, all raise the error.
        OSError: a full disk. The path is as it was: a save is whole or absent.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout != "deepseek_v3" and (norm != "neutral" or latent_rms is not None):
        raise ValueError(f"got norm or latent_rms with layout {layout!r}, expected 'deepseek_v3'")
    check_fits(model, params)
    directory = local_path(path, "the path to save to")
    with saving(params, directory, layout) as part:
        write_model(model, params, part, layout, max_shard_bytes, norm=norm, latent_rms=latent_rms)


@contextlib.contextmanager
def saving(params: Any, directory: Path, layout: str) -> Iterator[Path]:
    """A folder for `write_model`, and for more files of the model; see `whole_folder`.

    Raises:
        ValueError: the directory already has a checkpoint, or the parameters of several processes
            cannot be saved in this layout.
    """
    _check_spread(params, layout)
    with whole_folder(directory, lambda: check_free(directory)) as part:
        yield part
    processes.barrier(f"saved {directory}")


def write_model(
    model: Transformer,
    params: dict[str, Any],
    directory: Path,
    layout: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    norm: str = "neutral",
    latent_rms: Sequence[np.ndarray] | None = None,
) -> None:
    """Writes the files of a model to the folder of `saving`; see `save`."""
    if layout == "native":
        native.write(model, params, directory)
    elif layout == "deepseek_v3":
        exported, arrays = to_deepseek(model, params, norm, latent_rms)
        _save_hf(exported, arrays, directory, max_shard_bytes)
        write_serving_files(model.config, json.loads(exported.config.hf_json), directory)
    else:
        _save_hf(model, params, directory, max_shard_bytes)


def is_saved(directory: Path) -> bool:
    """Whether a directory has a model, which is whole: `save` writes the configuration last."""
    return is_native(directory) or (directory / "config.json").exists()


def check_free(directory: Path) -> None:
    """Raises ValueError where a folder has a model, or weights that `load` would mix with it."""
    if is_saved(directory):
        raise ValueError(f"{directory} already holds a checkpoint: save to another directory")
    found = leftovers(directory) + [PARAMS] * (directory / PARAMS).exists()
    if found:  # from an interrupted save: `load` would mix these files with the new ones
        raise ValueError(
            f"{directory} holds weights without a config ({', '.join(found[:4])}"
            f"{', …' * (len(found) > 4)}): remove them, or save to another directory"
        )


def _check_spread(params: Any, layout: str) -> None:
    if not processes.several():
        return
    if layout == "deepseek_v3":
        raise ValueError("layout 'deepseek_v3' needs one process: save 'native', and export that")
    if any(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(params)):
        raise ValueError("got parameters of one process, expected arrays on a mesh of all of them")


def _save_hf(model: Transformer, params: Any, directory: Path, max_shard_bytes: int) -> None:
    text = _hf_config(model.config, params)  # before anything is written, because this may raise
    weights.write_params(model, params, directory, max_shard_bytes)
    if not processes.is_writer():
        return
    write_whole(directory / "config.json", text)
    eos = list(model.config.eos_ids)
    if eos and eos != list(config_from_hf(json.loads(text)).eos_ids):
        generation = {"bos_token_id": model.config.bos_id, "eos_token_id": eos}
        write_json(directory / GENERATION, generation)


def _hf_config(config: ModelConfig, params: Any) -> str:
    """The config.json the model came with; only its dtype follows the parameters.

    Raises:
        ValueError: the model differs from its config.json, or has none.
    """
    raw = json.loads(config.hf_json)
    kinds = sorted({type(layer.attention).__name__ for layer in config.layers})
    reason = f"the hf layout cannot express this model, with {', '.join(kinds)}:"
    advice = "use layout='native'"
    if not raw:
        raise ValueError(f"{reason} it has no config.json; {advice}")
    described = config_from_hf(raw)
    kept = {"hf_json": "", "eos_ids": (), "bos_id": None}
    if dataclasses.replace(described, **kept) != dataclasses.replace(config, **kept):
        raise ValueError(f"{reason} it differs from its config.json; {advice}")
    dtype = jax.tree.leaves(params)[0].dtype.name
    stale = [key for key in ("dtype", "torch_dtype") if raw.get(key, dtype) != dtype]
    if not stale:
        return config.hf_json
    return json.dumps(raw | dict.fromkeys(stale, dtype), indent=2) + "\n"


def write_serving_files(source: ModelConfig, raw: Mapping[str, Any], directory: Path) -> None:
    """Writes the files of an exported directory other than config.json and weights.

    Args:
        source: of the model that was exported. If source.source exists, the tokenizer and other
            companion files are copied from there.
        raw: the exported config.json.
    """
    # Without a source, Path("") would copy files from the working directory.
    if source.source and Path(source.source).exists():
        copy_companions(Path(source.source), directory)
    path = directory / GENERATION
    kept = read_object(path) if path.is_file() else {}
    write_json(path, generation_config(raw, kept))
    if raw.get("kvjax_requires"):
        write_whole(directory / NOTICE, notice(raw["kvjax_requires"]))


def generation_config(raw: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of the source with the special tokens of the exported config.json.

    Args:
        raw: the exported config.json.
        kept: generation_config.json of the source, {} if there was none.
    """
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    defaults = {key: value for key, value in kept.items() if key not in WRITER_KEYS}
    return {**defaults, **{key: value for key, value in ids.items() if value is not None}}


def notice(requires: list[str]) -> str:
    """The text of KVJAX_NOTICE.md: what an engine must support to serve this checkpoint."""
    lines = [f"- `{key}`: {NEEDS[key]}" for key in requires]
    return (
        "# Before you serve this checkpoint\n\n"
        "Exported by kvjax: attention with latents as DeepseekV3ForCausalLM, with dense MLPs.\n"
        "`kvjax_requires` in config.json names what a loader must obey:\n\n"
        + "\n".join(lines)
        + "\n\ntransformers obeys it. docs/export.md of kvjax says what other engines do.\n"
    )
