"""Models and tokenizers from directories, GGUF files, the hub, or the package."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from kvjax.checkpoint_files import StoredTensor, scan
from kvjax.checks import float_dtype
from kvjax.fields import refuse, within
from kvjax.hf import gguf, native, weights
from kvjax.hf.config import as_stored, config_from_hf, read_config
from kvjax.hf.source import (
    gguf_file,
    is_native,
    on_hub,
    resolve,
    tokenizer_file,
    with_weights,
)
from kvjax.nn import Transformer
from kvjax.sharding import param_shardings
from kvjax.text_files import read_object, refuse_pointers

LAYOUTS = ("native", "hf", "deepseek_v3")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "config.json"),
)


def load(
    path: str | Path, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """A model and its parameters.

    Args:
        path: a directory that `save` or Hugging Face's `save_pretrained` wrote, a GGUF file, a
            directory with one, "builtin:<name>", or a hub id, with or without a revision and a
            folder, such as "org/name@main/folder"; no URL.
        dtype: of the parameters, which are cast once, on their way to the devices. None: see
            `default_dtype`.
        mesh: shards the parameters, see `kvjax.sharding`; None: the default device.

    Returns:
        The model and its parameters, a nested dict.

    Raises:
        ValueError: the model does not exist or is unsupported, or the checkpoint does not fit its
            config. One error lists every missing, unexpected or misshapen tensor.

    Examples:
        >>> model, params = kvjax.load(path)  # a folder, a GGUF file, or an id of the hub
    """
    target = float_dtype(dtype or default_dtype())
    model, directory = _with_weights(path)
    parts = _open(model, directory, target, mesh)
    # The largest matrices first: what their reading needs for a moment does not come on top of all.
    order = sorted(parts, key=lambda name: name.startswith("layers_"))
    return model, {name: parts[name] for name in order}


def default_dtype(platform: str | None = None) -> str:
    """The dtype of parameters, activations and caches where the caller names none.

    It is "float32" on CPUs, which compute in bfloat16 more slowly, and "bfloat16" on accelerators.

    Args:
        platform: platform of the devices; None for jax's default backend.
    """
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def open_params(path: str | Path, dtype: Any = None, mesh: Mesh | None = None) -> Mapping[str, Any]:
    """The parameters of the model at `path`; `params["layers_3"]` reads that layer.

    Args:
        dtype, mesh: as for `load`.

    Raises:
        ValueError: as `load`.
    """
    target = float_dtype(dtype or default_dtype())
    model, directory = _with_weights(path)
    return _open(model, directory, target, mesh)


def read_model(path: str | Path) -> Transformer:
    """The model at `path` without its parameters, which are not downloaded.

    If config.json ties the output matrix to the embedding and local weights hold both matrices, the
    two are compared; if they differ, the model is not tied.

    Raises:
        ValueError: no such model, or an unsupported one.
    """
    directory = resolve(path)
    if is_native(directory):
        config = native.read_config(directory)
    elif file := gguf_file(directory):
        config = gguf.read_config(file)
    else:
        config = as_stored(read_config(directory), directory)
    return Transformer(dataclasses.replace(config, source=str(directory)))


def read_shape(source: str) -> Transformer:
    """The model of a config.json file, or at a path or hub id. Weights are not read.

    Raises:
        ValueError: no such model, or an unsupported one.
    """
    path = Path(source)
    if not path.is_file() or gguf_file(path):
        return read_model(source)
    raw = read_object(path)
    with within(path):
        return Transformer(config_from_hf(raw))


def layout_of(path: str | Path) -> str:
    """ "native" or "hf", the layout that `save` was asked for, or "gguf"."""
    place = resolve(path)
    return "native" if is_native(place) else "gguf" if gguf_file(place) else "hf"


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face checkpoint or a GGUF file by name; `open` reads a tensor.

    Raises:
        ValueError: the model does not exist, its files are damaged, or its layout is native, which
            does not store arrays as safetensors.
    """
    directory = resolve(path)
    if is_native(directory):
        raise ValueError(f"{directory} is in the native layout, expected safetensors")
    directory = with_weights(path, directory)
    if file := gguf_file(directory):
        return gguf.stored_tensors(file)
    found = scan(directory)
    refuse(found.problems)
    return found.tensors


def load_tokenizer(path: str | Path) -> Any:
    """The fast tokenizer of a directory, GGUF file, hub id or builtin model.

    Raises:
        ValueError: no such model, or files that are missing or damaged.
    """
    directory = resolve(path)
    if file := tokenizer_file(directory):
        return gguf.load_tokenizer(file)
    from transformers import AutoTokenizer

    files = sorted(path for pattern in TOKENIZER_FILES for path in directory.glob(pattern))
    refuse_pointers(files)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a damaged file may raise anything, in any number of lines
        for file in files:
            if file.suffix == ".json":
                read_object(file)  # raises an error that names a damaged file
        if not files:
            raise ValueError(f"{directory} has no tokenizer, expected tokenizer.json") from None
        line = " ".join(str(error).split())
        kind = type(error).__name__
        raise ValueError(f"cannot read the tokenizer of {directory}: {kind}: {line}") from error


def _with_weights(path: str | Path) -> tuple[Transformer, Path]:
    """The model at `path`, and the directory or the GGUF file with its weights.

    The configuration is read first, so that an unsupported model is not downloaded.
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
    if file := gguf_file(directory):
        return gguf.open_params(model, file, dtype, shardings)
    read = native.open_params if is_native(directory) else weights.open_params
    return read(model, directory, dtype, shardings)
