"""Where a model lies: a directory, the package's own models, or the hub."""

from pathlib import Path

BUILTIN = "builtin:"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "builtin"
PATTERNS = (
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def resolve(path: str | Path) -> Path:
    """The directory of a model; one from the hub is downloaded.

    Raises:
        ValueError: neither a directory nor a model of the package or of the hub, or the hub
            cannot be reached.
    """
    directory = Path(path)
    if isinstance(path, str) and path.startswith(BUILTIN):
        return _builtin(path.removeprefix(BUILTIN))
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file, expected a directory")
    return _download(str(path))


def _builtin(name: str) -> Path:
    names = sorted(p.name for p in BUILTIN_DIRECTORY.glob("*") if (p / "config.json").is_file())
    names += sorted(p.parent.name for p in BUILTIN_DIRECTORY.glob("*/kvjax.json"))
    if name not in names:
        raise ValueError(f"no builtin model {name!r}, expected one of {', '.join(names) or '–'}")
    return BUILTIN_DIRECTORY / name


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except HFValidationError:
        raise ValueError(f"{name} is neither a directory nor a hub id") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{name} is no directory, is not in the local hub cache, and the hub is unreachable"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is no directory, and the hub says: {line}") from None
