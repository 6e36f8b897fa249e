"""What the numbers of a benchmark belong to: processor, versions, commit, command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDERS = re.compile(r"(?<=[ =])/\S*/(?=[^/\s])")


def environment(module: str, packages: Sequence[str] = ("jax",)) -> dict[str, Any]:
    """Date, machine, versions of Python and of `packages`, commit, and the command.

    Args:
        module: the benchmark's name, as in `python -m module`.
    """
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [x.split(":", 1)[1].strip() for x in cpuinfo.splitlines() if x.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "commit": commit(),
        "command": without_folders(" ".join(["python -m", module, *sys.argv[1:]])),
    }


def without_folders(command: str) -> str:
    """The text of a command or a policy, with absolute paths cut to their last part."""
    return FOLDERS.sub("", command)


def commit() -> str:
    """The checked-out commit; +changes where the library differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    # The paths are those of the repository's root, whatever the current directory is.
    changes = subprocess.run(
        [*git, "status", "--porcelain", ":/kvjax", ":/pallas_kernels"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
