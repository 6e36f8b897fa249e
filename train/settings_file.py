"""YAML files with settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty for an empty file.

    Raises:
        ValueError: no such file, no YAML, or no mapping.
    """
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
