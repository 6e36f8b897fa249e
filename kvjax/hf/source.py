"""Where a model lies: a directory, the package's own models, or the hub."""

from pathlib import Path

from kvjax.hf import hub
from kvjax.paths import local_path

BUILTIN = "builtin:"
BUILTIN_DIRECTORY = Path(__file__).parents[1] / "builtin"


def resolve(path: str | Path) -> Path:
    """The directory of a model; of one from the hub all but the weights is downloaded.

    Raises:
        ValueError: neither a directory nor a model of the package or of the hub, a URL, or the
            hub cannot be reached.
    """
    if _is_builtin(path):
        return _builtin(str(path).removeprefix(BUILTIN))
    directory = local_path(path, "the model")
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file, expected a directory")
    return hub.look(str(path))


def with_weights(path: str | Path, directory: Path) -> Path:
    """The directory of the model at `path` with its weights, downloaded if it is on the hub.

    Args:
        directory: what `resolve(path)` gave.

    Raises:
        ValueError: see `resolve`, or weights that are not to be had.
    """
    return hub.weights(str(path), directory) if on_hub(path) else directory


def on_hub(path: str | Path) -> bool:
    """Whether a path that `resolve` knows is a hub id."""
    return not _is_builtin(path) and not Path(path).is_dir()


def _is_builtin(path: str | Path) -> bool:
    return isinstance(path, str) and path.startswith(BUILTIN)


def _builtin(name: str) -> Path:
    names = sorted(p.name for p in BUILTIN_DIRECTORY.glob("*") if (p / "config.json").is_file())
    names += sorted(p.parent.name for p in BUILTIN_DIRECTORY.glob("*/kvjax.json"))
    if name not in names:
        raise ValueError(f"no builtin model {name!r}, expected one of {', '.join(names) or '–'}")
    return BUILTIN_DIRECTORY / name
