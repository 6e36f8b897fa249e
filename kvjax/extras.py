"""Packages that the base install lacks, each part of an extra of pyproject.toml."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """A module of a package that the base install lacks.

    A command calls this function before the work that would be lost without the package.

    Args:
        extra: the extra of pyproject.toml that installs the package.

    Raises:
        ValueError: the package is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or module).split(".")[0]
        line = f'the package {name} is not installed: pip install "kvjax[{extra}]"'
        raise ValueError(line) from error


def pyplot() -> Any:
    """The module matplotlib.pyplot, which then draws into files and needs no display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    import_extra("matplotlib", "plots").use("Agg")
    return import_extra("matplotlib.pyplot", "plots")
