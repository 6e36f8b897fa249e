"""jax's persistent compilation cache, on by default in the command lines.

A process writes its compiled programs to a folder, and later processes read them. The command lines
call `enable`. Users of the library decide for themselves, with `enable` or jax's own settings.
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
"""Largest size of the default folder, in bytes; the programs of all jax versions count together."""


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --compilation-cache, and the arguments without this flag.

    Raises:
        ValueError: the flag without a value.
    """
    return paths.take_flag(argv, FLAG, "a folder, or off")


def enable(choice: str | None = None, several: bool = False) -> None:
    """Keeps compiled programs for later processes. Prints a warning if no folder can be written.

    Without a `choice`, the user's settings of jax apply: JAX_COMPILATION_CACHE_DIR,
    JAX_ENABLE_COMPILATION_CACHE and `jax.config`.

    Args:
        choice: a folder, or "off"; None or empty for jax's setting, else the user's cache folder.
        several: whether this process is one of several in a run. Then the user's cache folder is
            not used by default: on GPUs the processes compile together, and a process that reads
            a program instead would make the others wait.

    Raises:
        ValueError: a URL as `choice`.
    """
    choice = choice or None
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    told: Any = jax.config  # Any: jax adds the attributes at run time, so pyright knows none
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
    """Deletes the least recently used programs until at most `most_bytes` are left.

    Deletes empty files too. A machine that stops suddenly leaves such files, and jax does not
    replace them.

    Args:
        folder: contains one folder of programs for each version of jax.
    """
    found = []
    for path in folder.glob("jax-*/*-cache"):
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:
            continue  # another process deleted the file
    total = 0
    for path, facts in sorted(found, key=lambda file: -max(file[1].st_atime, file[1].st_mtime)):
        total += facts.st_size
        if total > most_bytes or facts.st_size == 0:
            path.unlink(missing_ok=True)


def _default_folder() -> Path:
    """A folder for this version of jax, which cannot read other versions' programs (XDG)."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path("~/.cache").expanduser()
    return base / "kvjax" / f"jax-{jax.__version__}"


def _check_writable(folder: Path) -> None:
    # Programs are code that will run here: no other user may write them.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _keep_small_programs() -> None:
    """Also stores programs that compile in under a second, as blocks do; jax skips these."""
    variable = "jax_persistent_cache_min_compile_time_secs"
    if variable.upper() not in os.environ:
        jax.config.update(variable, 0.0)
    # A program that cannot be read or written is compiled as without a cache.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
