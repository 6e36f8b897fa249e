"""Settings of a run from a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from kvjax.extras import import_extra

Settings = TypeVar("Settings")


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty for an empty file.

    Raises:
        ValueError: no such file, not YAML, or not a mapping from names.
    """
    yaml = import_extra("yaml", "train")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}, expected a mapping of settings")
    odd = [key for key in raw if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{path}: got keys {odd}, expected names of settings")
    return raw


def read_dataclass(kind: type[Settings], path: Path, **changes: Any) -> Settings:
    """A dataclass of settings from a YAML file whose keys are its attributes.

    YAML's lists become tuples.

    Args:
        kind: the dataclass; its `__post_init__` checks the values.
        changes: attributes that override the file's.

    Raises:
        ValueError: see `read_settings`; an unknown or missing key, or a bad value.
    """
    raw = read_settings(path)
    known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise ValueError(f"{path}: got keys {unknown}, expected some of {sorted(known)}")
    content = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
    try:
        return kind(**{**content, **changes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
