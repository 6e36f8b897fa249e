"""What a result belongs to: date, device, versions, commit, command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "transformers", "numpy")


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """The entries of results.json that say where it was made.

    Args:
        argv: arguments of `python -m eval`.
    """
    devices = jax.devices()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "eval", *argv]),
    }


def commit() -> str | None:
    """The checked-out commit; +changes where the code differs from it; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    paths = [":/kvjax", ":/pallas_kernels", ":/eval"]
    try:
        head, changes = (
            subprocess.run([*git, *rest], capture_output=True, text=True, check=True).stdout
            for rest in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", *paths])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+changes" if changes.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
