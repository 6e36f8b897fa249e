"""What a command says while it works, on standard error: stages, and bars over many parts.

A stage of a few seconds says nothing. A longer one is named while it lasts, and its line ends with
the seconds, and how many of them compiling took: `[reading the prompt … 41 s, of which 38 s
compiling]`. A bar moves in a terminal; elsewhere, such as in a log, it is a line now and then.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvjax import processes

PATIENCE = 2.0
"""Seconds after which a stage is named."""
EVERY = 30.0
"""Seconds between two lines of a bar that is not in a terminal."""
Part = TypeVar("Part")
COMPILING = "/jax/core/compile/"
"""Beginning of the names of jax's events of tracing, lowering and compiling."""


class Stage:
    """A part of a command's work, from its creation until `end`."""

    def __init__(self, what: str):
        """Starts the stage.

        Args:
            what: what the command does, such as "loading builtin:smollm2".
        """
        self._what, self._start = what, time.monotonic()
        self._said, self._ended, self._lock = False, False, threading.Lock()
        self._spans = contextlib.ExitStack()
        self._compiling = self._spans.enter_context(compile_spans())
        self._timer = threading.Timer(PATIENCE, self._name)
        self._timer.daemon = True
        self._timer.start()

    def _name(self) -> None:
        with self._lock:
            if not self._ended and processes.is_writer():
                self._said = True
                print(f"[{self._what} …", end=" ", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the stage; a second call does nothing."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        self._timer.cancel()
        self._spans.close()
        if self._said:
            line = seconds(time.monotonic() - self._start, self._compiling)
            print(f"{line}]", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """A block that is one `Stage`."""
    begun = Stage(what)
    try:
        yield
    finally:
        begun.end()


def seconds(passed: float, compiling: Sequence[tuple[float, float]]) -> str:
    """Seconds as the end of a stage says them.

    Args:
        compiling: spans from `compile_spans`.
    """
    taken = covered(compiling)
    return f"{passed:.0f} s" + (f", of which {taken:.0f} s compiling" if taken >= 1 else "")


@contextlib.contextmanager
def compile_spans() -> Iterator[list[tuple[float, float]]]:
    """Collects when jax traced, lowered and compiled programs: (start, end), seconds."""
    import jax

    spans: list[tuple[float, float]] = []

    def note(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if event.startswith(COMPILING):
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(note)
    try:
        yield spans
    finally:
        jax.monitoring.unregister_event_time_span_listener(note)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that are in at least one span. Programs within programs have spans within spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class Lines(Progress):
    """A bar for logs: a line of each task every `EVERY` seconds and at its end."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._last = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task = next(task for task in self.tasks if task.id == task_id)
        if time.monotonic() - self._last < EVERY or not task.total:
            return
        self._last = time.monotonic()
        parts = [f"{task.description}: {task.percentage:.0f} %", task.fields["items"]]
        parts.append(f"{task.elapsed or 0:.0f} s")
        print(f"[{', '.join(part for part in parts if part)}]", file=sys.stderr, flush=True)


def progress_bar(quiet: bool = False) -> Progress:
    """A bar of finished parts with the remaining time.

    Add tasks with `items=`, a text that stands behind the bar, "" for none.

    Args:
        quiet: says nothing.
    """
    terminal = sys.stderr.isatty()
    if not terminal and not quiet and processes.is_writer():
        return Lines()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[items]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not processes.is_writer() or not terminal,
    )


def tracked(parts: Iterable[Part], what: str, total: int) -> Iterator[Part]:
    """The parts, under a bar."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=total, items="")
        for part in parts:
            yield part
            bar.advance(task)
