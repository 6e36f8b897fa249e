"""jax's persistent compilation cache, on by default in the command lines.

A program that one process compiled is read from a folder by the next. The command lines call
`enable`; who imports kvjax as a library decides with jax's own settings.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax

from kvjax import paths
from kvjax.paths import local_path

FLAG = "--compilation-cache"
HELP = f"""{FLAG} DIR|off: where compiled programs are kept for later runs, or nowhere; otherwise
JAX_COMPILATION_CACHE_DIR, or ~/.cache/kvjax"""

MOST_BYTES = 4 << 30
"""Of the default folder; those of all versions of jax count together."""


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --compilation-cache, and the arguments without it.

    Raises:
        ValueError: the flag without a value.
    """
    return paths.take_flag(argv, FLAG, "a folder, or off")


def enable(choice: str | None = None, several: bool = False) -> None:
    """Keeps compiled programs for later processes; without a folder to write to, says so.

    What the user told jax (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE, `jax.config`)
    counts where there is no `choice`.

    Args:
        choice: a folder, or "off"; None or empty for jax's setting, else the user's cache folder.
        several: whether this is one of several processes of a run. On GPUs they compile together,
            and would wait for one that reads: they use no folder that nobody has named.

    Raises:
        ValueError: a URL as `choice`.
    """
    choice = choice or None
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    told: Any = jax.config  # its attributes are made while jax starts
    if choice is None and not told.jax_enable_compilation_cache:
        return
    if choice is None and told.jax_compilation_cache_dir is not None:
        _keep_small_programs()
        return
    if choice is None and several:
        return
    try:
        folder = _default_folder() if choice is None else local_path(choice, FLAG)
        _check_writable(folder)
        if choice is None:
            tidy(folder.parent, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        print(f"kvjax: warning: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _keep_small_programs()


def tidy(folder: Path, most_bytes: int) -> None:
    """Deletes the programs that were not read for longest, until no more than `most_bytes` stay.

    Empty files go too: they are left by a machine that stopped, and jax would not replace them.

    Args:
        folder: with a folder of programs for each version of jax.
    """
    found = []
    for path in folder.glob("jax-*/*-cache"):
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:
            continue  # deleted by a process beside this one
    total = 0
    for path, facts in sorted(found, key=lambda file: -max(file[1].st_atime, file[1].st_mtime)):
        total += facts.st_size
        if total > most_bytes or facts.st_size == 0:
            path.unlink(missing_ok=True)


def _default_folder() -> Path:
    """XDG's cache folder of the user; programs of one version of jax are of no use to another."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path("~/.cache").expanduser()
    return base / "kvjax" / f"jax-{jax.__version__}"


def _check_writable(folder: Path) -> None:
    # Programs are code that runs: nobody else may write them.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _keep_small_programs() -> None:
    """jax would keep only what took a second to compile: a model's block takes less."""
    variable = "jax_persistent_cache_min_compile_time_secs"
    if variable.upper() not in os.environ:
        jax.config.update(variable, 0.0)
    # A program that cannot be read or written is compiled as without a cache.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
