"""Commands in processes of their own that are killed, or whose disk is full, at a chosen moment.

A process is forked from one that has imported everything, so it costs little more than its work.
Changes of a folder are counted: each file that is opened to write, renamed or removed. SIGKILL
comes just before one of them, or a moment later, so that the same kill can be had again.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTS = [
    "flax.linen",
    "grain",
    "matplotlib.pyplot",
    "optax",
    "orbax.checkpoint",
    "transformers.models.auto.tokenization_auto",
    "kvjax.cli",
    "kvjax.generation",
    "kvjax.headkv",
    "kvjax.hf",
    "kvjax.transmla",
    "eval.run",
    "train.finetune.run",
]
"""What the commands import, much of it inside functions. None of it starts jax's backend, which
threads no fork has."""
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Events of `sys.addaudithook` that change files; os.replace is reported as os.rename."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Disturbance:
    """What happens to a process.

    Attributes:
        change: SIGKILL comes before this change of the folder, counted from 1; None for never.
        delay: seconds between that moment and SIGKILL.
        file_bytes: size beyond which no file can grow.
    """

    change: int | None = None
    delay: float = 0.0
    file_bytes: int = resource.RLIM_INFINITY


CALM = Disturbance()
"""No disturbance."""


def start(
    words: Sequence[str],
    said: Path,
    folder: Path | None = None,
    disturbance: Disturbance = CALM,
    **environment: str,
) -> Any:
    """Starts `python -m WORDS…` as a process that writes its standard error to the file `said`.

    Args:
        folder: its changes are counted; their number is in NAME.changes beside `said` afterwards.
        environment: variables of the process. jax has read its own by then.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTS)
    arguments = [str(word) for word in words], said, folder, disturbance, environment
    process = processes.Process(target=_run, args=arguments)
    process.start()
    return process


def _run(
    words: list[str],
    said: Path,
    folder: Path | None,
    disturbance: Disturbance,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    with said.open("w") as errors, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_bytes, hard))
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # of runpy
    changes = [] if folder is None else _watch(folder, disturbance)
    module, *sys.argv[1:] = words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if folder is not None and disturbance == CALM:
            changes_file(said).write_text(str(len(changes)))
        atexit._run_exitfuncs()  # an interpreter calls them; multiprocessing does not


def changes_file(said: Path) -> Path:
    return said.with_name(f"{said.name}.changes")


def _watch(folder: Path, disturbance: Disturbance) -> list[str]:
    """From now on, adds the events that change the folder to a list, and kills when it is time."""
    place, changes = str(folder), []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & WRITING):
                return
        elif event not in CHANGES:
            return
        if not any(_is_path(each) and os.fsdecode(each).startswith(place) for each in arguments):
            return
        changes.append(event)
        if len(changes) == disturbance.change:
            _kill(disturbance.delay)

    sys.addaudithook(hook)
    return changes


def _is_path(value: Any) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _kill(delay: float) -> None:
    if delay:
        threading.Timer(delay, _kill, (0.0,)).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
