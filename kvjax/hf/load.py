"""Models and tokenizers from directories and the hub, and back to directories."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax import processes
from kvjax.config import ModelConfig
from kvjax.hf import native, weights
from kvjax.hf.checkpoint import MAX_SHARD_BYTES, leftovers, scan
from kvjax.hf.config import config_from_hf, read_config
from kvjax.hf.deepseek import to_deepseek, write_serving_files
from kvjax.hf.json_file import read_json, refuse_pointers
from kvjax.hf.source import on_hub, resolve, with_weights
from kvjax.hf.tensor_file import StoredTensor
from kvjax.hf.tied import as_stored
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.sharding import param_shardings

LAYOUTS = ("native", "hf", "deepseek_v3")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "config.json"),
)


def load(
    path: str | Path, dtype: Any = "bfloat16", mesh: Mesh | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """A model and its parameters.

    Args:
        path: a directory that `save` or Hugging Face's `save_pretrained` wrote, a hub id, or
            "builtin:<name>"; no URL.
        dtype: of the parameters; they are cast once, on their way to the devices.
        mesh: spreads the parameters over its axes, see `kvjax.sharding`; None: the default device.

    Returns:
        The model and its parameters, a nested dict.

    Raises:
        ValueError: no such model, an unsupported one, or a checkpoint that does not fit its
            config; one error lists everything that is missing, unexpected or misshapen.

    >>> model, params = kvjax.load("Qwen/Qwen3-0.6B")
    """
    target = _float_dtype(dtype)
    model, directory = _with_weights(path)
    return model, dict(_open(model, directory, target, mesh))


def open_params(
    path: str | Path, dtype: Any = "bfloat16", mesh: Mesh | None = None
) -> Mapping[str, Any]:
    """The parameters of the model at `path`, each layer read when it is asked for.

    Args:
        dtype, mesh: as of `load`.

    Raises:
        ValueError: as `load`.
    """
    target = _float_dtype(dtype)
    model, directory = _with_weights(path)
    return _open(model, directory, target, mesh)


def read_model(path: str | Path) -> Transformer:
    """The model at `path` without its parameters, which are not downloaded either.

    Weights are read only where config.json ties the output matrix to the embedding and the
    checkpoint holds both: they are compared, and a model whose two matrices differ is not tied.

    Raises:
        ValueError: no such model, or an unsupported one.
    """
    directory = resolve(path)
    if native.is_native(directory):
        config = native.read_config(directory)
    else:
        config = as_stored(read_config(directory), directory)
    return Transformer(dataclasses.replace(config, source=str(directory)))


def read_shape(source: str) -> Transformer:
    """The model of a config.json, or at a path or hub id: its shape, for which no weights exist.

    Raises:
        ValueError: no such model, or an unsupported one.
    """
    path = Path(source)
    if not path.is_file():
        return read_model(source)
    raw = read_json(path)[1]
    try:
        return Transformer(config_from_hf(raw))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def layout_of(path: str | Path) -> str:
    """ "native" or "hf", the layout that `save` was asked for."""
    return "native" if native.is_native(resolve(path)) else "hf"


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face checkpoint by name; each is read when it is opened.

    Raises:
        ValueError: no such model, damaged files, or the native layout, whose arrays have no
            files of their own.
    """
    directory = resolve(path)
    if native.is_native(directory):
        raise ValueError(f"{directory} is in the native layout, expected safetensors")
    directory = with_weights(path, directory)
    found = scan(directory)
    if found.problems:
        raise ValueError(f"cannot read {directory}: {'; '.join(found.problems)}")
    return found.tensors


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
    """Writes a directory that `load` reads: the model, and no tokenizer but for "deepseek_v3".

    That layout is for engines, which want one directory: it also gets generation_config.json, and
    where `model.config.source` names the directory that the model came from, the tokenizer and its
    other companions.

    With several processes (`kvjax.processes`) all call it, with arrays on a mesh of all of them and
    a directory that all of them see.

    Args:
        layout: "native" (orbax, any model), "hf" (safetensors and config.json, for models that
            transformers knows), or "deepseek_v3" (the same, for models of the decoupled
            conversion, which transformers loads as DeepseekV3ForCausalLM; see docs/export.md).
        max_shard_bytes: safetensors files are split beyond that.
        norm, latent_rms: of "deepseek_v3" alone, see `kvjax.hf.deepseek.to_deepseek`.

    Raises:
        ValueError: an unknown layout, a URL, a path that already holds a checkpoint, a model that
            the layout cannot express; nothing is written then. With several processes, all raise
            it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout != "deepseek_v3" and (norm != "neutral" or latent_rms is not None):
        raise ValueError(f"norm and latent_rms are of layout 'deepseek_v3', got layout {layout!r}")
    directory = local_path(path, "the path to save to")
    _check_spread(params, layout)
    processes.on_writer(lambda: _check_free(directory))
    if layout == "native":
        native.write(model, params, directory)
    elif layout == "deepseek_v3":
        exported, arrays = to_deepseek(model, params, norm, latent_rms)
        _save_hf(exported, arrays, directory, max_shard_bytes)
        write_serving_files(model.config, json.loads(exported.config.hf_json), directory)
    else:
        _save_hf(model, params, directory, max_shard_bytes)
    processes.barrier(f"saved {directory}")


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer (transformers' AutoTokenizer) of a directory, hub id or builtin model.

    Raises:
        ValueError: no such model, or files that are missing or damaged.
    """
    from transformers import AutoTokenizer

    directory = resolve(path)
    files = sorted(path for pattern in TOKENIZER_FILES for path in directory.glob(pattern))
    refuse_pointers(files)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a damaged file may raise anything, in any number of lines
        for file in files:
            if file.suffix == ".json":
                read_json(file)  # names the file, where it is no JSON object
        line = " ".join(str(error).split())
        kind = type(error).__name__
        raise ValueError(f"cannot read the tokenizer of {directory}: {kind}: {line}") from error


def _with_weights(path: str | Path) -> tuple[Transformer, Path]:
    """The model at `path`, and its directory with the weights.

    The configuration is read first: a model that is not supported is refused, not downloaded.
    """
    directory = resolve(path)
    model = read_model(directory)
    if not on_hub(path):
        return model, directory
    # Read again: the weights may be of a newer commit, whose configuration came with them.
    directory = with_weights(path, directory)
    return read_model(directory), directory


def _open(
    model: Transformer, directory: Path, dtype: np.dtype, mesh: Mesh | None
) -> Mapping[str, Any]:
    shardings = None if mesh is None else param_shardings(model, mesh)
    read = native.open_params if native.is_native(directory) else weights.open_params
    return read(model, directory, dtype, shardings)


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}, expected a floating-point type like 'bfloat16'")
    return found


def _check_free(directory: Path) -> None:
    if native.is_native(directory) or (directory / "config.json").exists():
        raise ValueError(f"{directory} already holds a checkpoint")
    found = leftovers(directory) + [native.PARAMS] * (directory / native.PARAMS).exists()
    if found:  # of a save that was stopped; what is written now would be read together with them
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
    text = _hf_config(model.config, params)
    directory.mkdir(parents=True, exist_ok=True)
    weights.write_params(model, params, directory, max_shard_bytes)
    if not processes.is_writer():
        return
    (directory / "config.json").write_text(text, encoding="utf-8")
    eos = list(model.config.eos_ids)
    if eos and eos != list(config_from_hf(json.loads(text)).eos_ids):
        generation = {"bos_token_id": model.config.bos_id, "eos_token_id": eos}
        text = json.dumps(generation, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")


def _hf_config(config: ModelConfig, params: Any) -> str:
    """The config.json the model came with; only its dtype follows the parameters.

    Raises:
        ValueError: the model is no longer, or never was, what its config.json says.
    """
    raw = json.loads(config.hf_json)
    kinds = sorted({type(layer.attention).__name__ for layer in config.layers})
    reason = f"the hf layout cannot express this model ({', '.join(kinds)}); use layout='native'"
    if not raw:
        raise ValueError(f"{reason}: it has no config.json")
    described = config_from_hf(raw)
    kept = {"hf_json": "", "eos_ids": (), "bos_id": None}
    if dataclasses.replace(described, **kept) != dataclasses.replace(config, **kept):
        raise ValueError(f"{reason}: it differs from its config.json")
    dtype = jax.tree.leaves(params)[0].dtype.name
    stale = [key for key in ("dtype", "torch_dtype") if raw.get(key, dtype) != dtype]
    if not stale:
        return config.hf_json
    return json.dumps(raw | dict.fromkeys(stale, dtype), indent=2) + "\n"
