"""Where a model is (a directory, a GGUF file, one of the package's own models, or the hub)."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvjax.checkpoint_files import INDEX, SINGLE, read_index
from kvjax.hf.gguf import files as gguf_files
from kvjax.hf.gguf.tokenizer import load_tokenizer
from kvjax.paths import copy_whole, local_path

CONFIG = "kvjax.json"
"""The configuration of a model in kvjax's own layout; see kvjax.hf.native."""
PARAMS = "params"
BUILTIN = "builtin:"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "builtin"


def resolve(path: str | Path) -> Path:
    """The directory of a model, or its GGUF file where the path names one.

    From the hub, all files except the weights are downloaded. The configuration in a GGUF is in the
    file with the weights, so that file is downloaded whole.

    Raises:
        ValueError: the path is not a directory, a GGUF file, a builtin model or a model on the hub;
            the path is a URL; or the hub cannot be reached.
    """
    if _is_builtin(path):
        return _builtin(str(path).removeprefix(BUILTIN))
    place = local_path(path, "the model")
    if place.is_dir():
        return place
    if place.suffix == gguf_files.SUFFIX and (place.exists() or not _repository_file(path)):
        return gguf_files.pieces(place)[0]
    if place.exists():
        raise ValueError(f"{path} is a file, expected a directory or a {gguf_files.SUFFIX} file")
    return hub_files(str(path))


def gguf_file(place: Path) -> Path | None:
    """The GGUF file, or its first piece, that holds the weights of a model; None for other models.

    A directory with safetensors or in the native layout is read as such, whatever else it has.

    Args:
        place: from `resolve`.

    Raises:
        ValueError: the directory has several GGUF models and no other weights.
    """
    if place.suffix == gguf_files.SUFFIX and place.is_file():
        return place
    if is_native(place) or any((place / name).is_file() for name in (SINGLE, INDEX)):
        return None
    return gguf_files.in_folder(place)


def tokenizer_file(place: Path) -> Path | None:
    """The GGUF file that has the tokenizer of a model; None where other files have it.

    Args:
        place: from `resolve`.
    """
    file = gguf_file(place)
    own = place.is_dir() and any(True for name in VOCABULARIES for _ in place.glob(name))
    return None if own else file


def with_weights(path: str | Path, directory: Path) -> Path:
    """The directory of the model at `path` with its weights, downloaded if it is on the hub.

    Args:
        directory: the result of `resolve(path)`.

    Raises:
        ValueError: see `resolve`; or a weight file is missing.
    """
    if not on_hub(path) or directory.is_file():
        return directory
    return hub_weights(str(path), directory)


def on_hub(path: str | Path) -> bool:
    """Whether a path that `resolve` accepts is a hub id."""
    return not _is_builtin(path) and not Path(path).exists()


def is_native(directory: Path) -> bool:
    """Whether a directory has kvjax's own layout."""
    return (directory / CONFIG).is_file()


def _is_builtin(path: str | Path) -> bool:
    return isinstance(path, str) and path.startswith(BUILTIN)


def _builtin(name: str) -> Path:
    names = sorted(p.name for p in BUILTIN_DIRECTORY.glob("*") if (p / "config.json").is_file())
    names += sorted(p.parent.name for p in BUILTIN_DIRECTORY.glob("*/kvjax.json"))
    names += sorted(p.parent.name for p in BUILTIN_DIRECTORY.glob(f"*/{gguf_files.PACKAGE}"))
    if name not in names:
        raise ValueError(f"no builtin model {name!r}, expected one of {', '.join(names) or '–'}")
    return BUILTIN_DIRECTORY / name


VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "tekken.json")
"""Files that have a tokenizer of their own, also beside a GGUF."""
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
FOREIGN = (".bin", ".safetensors", ".pth", ".pt", ".h5", ".msgpack", ".onnx")


def hub_files(name: str) -> Path:
    """Downloads the small files of the model `name` on the hub, and returns their folder.

    Args:
        name: the hub id of a model. "org/name@revision" is a branch, tag or commit of it, and
            "org/name@revision/folder" a folder in its repository. The path of a GGUF file may
            follow, "org/name/file.gguf"; the result is then that file. Without it and without a
            configuration, the model is the one GGUF of the repository.

    Raises:
        ValueError: the model does not exist, the hub cannot be reached, or the model has neither a
            configuration nor a tokenizer.
    """
    if file := _repository_file(name):
        try:
            return _hub_gguf(name.removesuffix(f"/{file}"), file)
        except ValueError as error:
            raise ValueError(f"there is no file {name}; as a file on the hub: {error}") from None
    directory = _download(name, LOOK)
    if (directory / "config.json").is_file() or is_native(directory):
        return directory
    place = _only_gguf(name, directory)
    if place is None and not any(file for pattern in TOKENIZER for file in directory.glob(pattern)):
        raise _not_found(name, "config.json", CONFIG)
    return place or directory


def hub_weights(name: str, directory: Path) -> Path:
    """Downloads the weights of the model `name` on the hub, and returns their folder.

    The weights are params/ of the native layout, model.safetensors, or the files that the index
    names, as in transformers. Other copies of the weights (original/, consolidated.safetensors,
    variants) are not downloaded. The weights of a model without safetensors are its one GGUF.

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
        place = _only_gguf(name, directory)
        if place is None:
            raise _not_found(name, SINGLE, INDEX)
        return place
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


class _HubName(NamedTuple):
    """The parts of a hub id, see `hub_files`.

    Attributes:
        revision: a branch, tag or commit; None for the main branch.
        folder: within the repository, with "/" at its end; "" for the whole repository.
    """

    repository: str
    revision: str | None
    folder: str

    @classmethod
    def of(cls, name: str) -> _HubName:
        repository, at, rest = name.partition("@")
        revision, _, folder = rest.partition("/")
        if at and not revision:
            raise ValueError(f"{name} names no revision after @, expected a branch, tag or commit")
        return cls(repository, revision or None, folder.strip("/") + "/" if folder else "")


def _repository_file(path: str | Path) -> str | None:
    """The GGUF file in "org/name/file.gguf", the path of a file in a repository of the hub."""
    words = str(path).split("/", 2)
    in_repository = len(words) == 3 and str(path).endswith(gguf_files.SUFFIX)
    return words[2] if in_repository and words[0] not in ("", ".", "..", "~") else None


def _only_gguf(name: str, directory: Path) -> Path | None:
    """Downloads the one GGUF model of a repository; None where there is none.

    Returns:
        The repository's folder, whose other files belong to the model; of a file in a folder within
        the repository, the file.
    """
    local = [path.relative_to(directory) for path in directory.rglob(f"*{gguf_files.SUFFIX}")]
    listed = _listing(name)
    file = gguf_files.only_model(map(str, local) if listed is None else listed, name)
    if file is None:
        return None
    path = _hub_gguf(name, file)
    return path if "/" in file else path.parent


def _hub_gguf(name: str, file: str) -> Path:
    """Downloads all pieces of a GGUF model, and returns the first."""
    names = gguf_files.all_pieces(file)
    directory = _download(name, [*LOOK, *map(glob.escape, names)])
    if not (directory / names[0]).is_file():
        raise _not_found(name, names[0])
    return gguf_files.pieces(directory / names[0])[0]


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    place = _HubName.of(name)
    wanted = [glob.escape(place.folder) + pattern for pattern in patterns]
    try:
        whole = snapshot_download(place.repository, revision=place.revision, allow_patterns=wanted)
        return Path(whole) / place.folder
    except HFValidationError:
        raise ValueError(f"{name} is neither a directory nor a hub id") from None
    except LocalEntryNotFoundError as error:
        # Newer clients raise this for a cached model that lacks any file, such as the licence.
        cached = getattr(error, "snapshot_path", None)
        if cached is not None:
            return Path(cached) / place.folder
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

    place = _HubName.of(name)
    try:
        found = huggingface_hub.model_info(place.repository, revision=place.revision, timeout=10)
        names = sorted(file.rfilename for file in found.siblings or ())
        return [file.removeprefix(place.folder) for file in names if file.startswith(place.folder)]
    except Exception:  # the caller reports another error; the listing only adds detail
        return None


def _first(files: Sequence[str]) -> str:
    """Three names, and how many more there are."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


BESIDE = ("LICENSE*", "NOTICE*", "head_scores*")
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
    "KVJAX_NOTICE*",
    "USE_POLICY*",
    *BESIDE,
)
"""Files of a model besides its configuration and its weights."""


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer, chat templates, generation defaults, licence and head scores to `out`.

    The tokenizer of a GGUF is written as transformers' files.

    Args:
        source: directory or GGUF file of a model, `ModelConfig.source`.
    """
    file = tokenizer_file(source)
    if file is not None:
        load_tokenizer(file).save_pretrained(out)
    # Other files beside a GGUF, such as tokenizers, need not be of the same model.
    patterns = COMPANIONS if source.is_dir() else BESIDE
    source = source if source.is_dir() else source.parent
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            else:
                copy_whole(path, out / path.name)
