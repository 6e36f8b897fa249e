"""Where a model is (a directory, one of the package's own models, or the hub), and its files."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvjax.checkpoint_files import INDEX, SINGLE, read_index
from kvjax.paths import local_path

CONFIG = "kvjax.json"
"""The configuration of a model in kvjax's own layout; see kvjax.hf.native."""
PARAMS = "params"
BUILTIN = "builtin:"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "builtin"


def resolve(path: str | Path) -> Path:
    """The directory of a model. From the hub, all files except the weights are downloaded.

    Raises:
        ValueError: the path is not a directory, a builtin model or a model on the hub; the path is
            a URL; or the hub cannot be reached.
    """
    if _is_builtin(path):
        return _builtin(str(path).removeprefix(BUILTIN))
    directory = local_path(path, "the model")
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file, expected a directory")
    return hub_files(str(path))


def with_weights(path: str | Path, directory: Path) -> Path:
    """The directory of the model at `path` with its weights, downloaded if it is on the hub.

    Args:
        directory: the result of `resolve(path)`.

    Raises:
        ValueError: see `resolve`; or a weight file is missing.
    """
    return hub_weights(str(path), directory) if on_hub(path) else directory


def on_hub(path: str | Path) -> bool:
    """Whether a path that `resolve` accepts is a hub id."""
    return not _is_builtin(path) and not Path(path).is_dir()


def is_native(directory: Path) -> bool:
    """Whether a directory has kvjax's own layout."""
    return (directory / CONFIG).is_file()


def _is_builtin(path: str | Path) -> bool:
    return isinstance(path, str) and path.startswith(BUILTIN)


def _builtin(name: str) -> Path:
    names = sorted(p.name for p in BUILTIN_DIRECTORY.glob("*") if (p / "config.json").is_file())
    names += sorted(p.parent.name for p in BUILTIN_DIRECTORY.glob("*/kvjax.json"))
    if name not in names:
        raise ValueError(f"no builtin model {name!r}, expected one of {', '.join(names) or '–'}")
    return BUILTIN_DIRECTORY / name


TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "tekken.json", "*.tiktoken", "spiece.model")
LOOK = (
    "config.json",
    "generation_config.json",
    CONFIG,
    INDEX,
    *TOKENIZER,
    "sentencepiece*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "head_scores*",
    "LICENSE*",
    "NOTICE*",
    "KVJAX_NOTICE*",
    "USE_POLICY*",
)
"""The small files of a model. In patterns of the hub's client, `*` also matches folders: "*.json"
or "*.model" would download files of original/ and of training checkpoints too."""
UNREACHABLE = "; the hub is unreachable"
FOREIGN = (".bin", ".gguf", ".safetensors", ".pth", ".pt", ".h5", ".msgpack", ".onnx")


def hub_files(name: str) -> Path:
    """Downloads the small files of the model `name` on the hub, and returns their folder.

    Raises:
        ValueError: the model does not exist, the hub cannot be reached, or the model has neither a
            configuration nor a tokenizer.
    """
    directory = _download(name, LOOK)
    useful = ("config.json", CONFIG, *TOKENIZER)
    if not any(file for pattern in useful for file in directory.glob(pattern)):
        raise _not_found(name, "config.json", CONFIG)
    return directory


def hub_weights(name: str, directory: Path) -> Path:
    """Downloads the weights of the model `name` on the hub, and returns their folder.

    The weights are params/ of the native layout, model.safetensors, or the files that the index
    names, as in transformers. Other copies of the weights (original/, consolidated.safetensors,
    variants) are not downloaded.

    Args:
        directory: the result of `hub_files`.

    Raises:
        ValueError: see `hub_files`; no safetensors under these names, or a missing file.
    """
    if is_native(directory):
        return _download(name, [*LOOK, f"{PARAMS}/*"])
    # The hub's client has a folder for each commit. If the model changed since `hub_files`, the
    # weights arrive in a new folder, which needs the small files too.
    directory = _download(name, [*LOOK, SINGLE])
    if (directory / SINGLE).is_file():
        return directory
    shards = index_files(directory)
    if not shards:
        raise _not_found(name, SINGLE, INDEX)
    directory = _download(name, [*LOOK, *map(glob.escape, shards)])
    missing = missing_weights(directory)
    if missing:
        raise ValueError(
            f"found no {_first(missing)} of {name}, on the hub or in the local hub cache, though "
            f"its {INDEX} names them{UNREACHABLE if _listing(name) is None else ''}"
        )
    return directory


def index_files(directory: Path) -> list[str]:
    """The files that the index names; none without an index.

    Raises:
        ValueError: the file is not an index.
    """
    path = directory / INDEX
    return sorted(set(map(str, read_index(path).values()))) if path.is_file() else []


def missing_weights(directory: Path) -> list[str]:
    """Weight files that a folder lacks; without an index, model.safetensors."""
    if (directory / SINGLE).is_file():
        return []
    files = index_files(directory) or [SINGLE]
    return [file for file in files if not os.path.isfile(directory / file)]  # "\0" included


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ValueError(f"{name} is neither a directory nor a hub id") from None
    except LocalEntryNotFoundError as error:
        # Newer clients raise this for a cached model that lacks any file, such as the licence.
        cached = getattr(error, "snapshot_path", None)
        if cached is not None:
            return Path(cached)
        raise ValueError(
            f"{name} is not a directory, is not in the local hub cache, and the hub is unreachable"
        ) from None
    except Exception as error:  # errors of the HTTP library have no common base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is not a directory, and the hub says: {line}") from None


def _not_found(name: str, *files: str) -> ValueError:
    """The error for a model without these files; names weights in formats kvjax does not read."""
    listed = _listing(name)
    found = [file for file in listed or () if file.endswith(FOREIGN)]
    instead = f"; it has {_first(found)}, which kvjax does not read" if found else ""
    return ValueError(
        f"found neither {' nor '.join(files)} of {name}, on the hub or in the local hub cache"
        f"{UNREACHABLE if listed is None else instead}"
    )


def _listing(name: str) -> list[str] | None:
    """The files of a model on the hub, for messages; None where the hub cannot be asked."""
    import huggingface_hub

    try:
        files = huggingface_hub.model_info(name, timeout=10).siblings or ()
        return sorted(file.rfilename for file in files)
    except Exception:  # the caller reports another error; the listing only adds detail
        return None


def _first(files: Sequence[str]) -> str:
    """Three names, and how many more there are."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "KVJAX_NOTICE*",
    "USE_POLICY*",
    "head_scores*",
)
"""Files of a model besides its configuration and its weights."""


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer, chat templates, generation defaults, licence and head scores to `out`."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, out)
