"""One writer an output, and how commands end: bad input, Ctrl-C and SIGTERM give one line each."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import filelock

from kvjax import processes
from kvjax.fields import Problems
from kvjax.usage import plain_usage_errors

BAD_INPUT = 2
"""Exit code after bad input; after a signal it is 128 + the signal's number, as shells count."""

GOES_ON = "what is finished is saved, and the same command goes on from there"
STARTS_OVER = "the same command starts over"
NOTHING_YET = f"nothing is written, and {STARTS_OVER}"
"""Notes for `only_writer`."""


class Terminated(BaseException):
    """SIGTERM arrived. Raised where the program is, so that it cleans up on its way out."""


@contextlib.contextmanager
def endings(command: str) -> Iterator[None]:
    """Surrounds a whole command and turns its end into a line on standard error and a code.

    Errors of users are ValueError, NotImplementedError and OSError: code 2, and a line for each
    problem of `kvjax.fields.Problems`, such as arguments that tyro refuses. Ctrl-C ends with 130
    and SIGTERM with 143; what they interrupt says in notes on the exception what is saved, see
    `only_writer`. Other errors are ours and keep their tracebacks.

    One of several processes ends at once on SIGTERM, without a line, see `kvjax.processes.join`.

    Args:
        command: begins the line, e.g. "kvjax".
    """
    # Without torch, which no command needs, transformers would advise every user to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        _quiet_orbax()
        with _sigterm_raises(), plain_usage_errors():
            yield
    except (ValueError, NotImplementedError, OSError) as error:
        for line in error_lines(error):
            say(f"{command}: error: {line}")
        processes.stop(BAD_INPUT)
    except (KeyboardInterrupt, Terminated) as error:
        by = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        notes = getattr(error, "__notes__", [])
        say("; ".join([f"{command}: stopped by {by.name}", *notes]))
        processes.stop(128 + by)


@contextlib.contextmanager
def only_writer(out: Path, note: str = "") -> Iterator[None]:
    """Keeps every other process from this output, a file or a folder, until the block ends.

    A file beside it, NAME.lock, names the process, and goes when the block ends. A killed process
    leaves it; the next one on the same machine sees that the process is gone and takes its place.
    Of several processes of one run, the first one holds the lock for all.

    Args:
        note: what a signal that stops the block tells the user.

    Raises:
        ValueError: another process holds the lock; names its pid and host.
    """
    if not processes.is_writer():
        yield
        return
    made, lock = _make_parents(out), filelock.SoftFileLock(lock_of(out), blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"{out} is being written by {_holder(lock_of(out))}") from None
    try:
        yield
    except BaseException as error:
        if note and not isinstance(error, Exception):
            error.add_note(note)
        raise
    finally:
        lock.release()
        for folder in made:  # a refused command leaves no empty folders
            with contextlib.suppress(OSError):
                folder.rmdir()


def lock_of(out: Path) -> Path:
    """The file that keeps other processes from an output."""
    place = Path(os.path.abspath(out))  # "." has no name
    return place.with_name(f"{place.name}.lock")


def say_finished(out: Path) -> None:
    """Says that a command has nothing to do: the same command made its output before."""
    if processes.is_writer():
        say(f"{out} is finished: nothing is left to do")


def _make_parents(out: Path) -> list[Path]:
    """Makes the folder of an output, and returns the folders that are new, the innermost first."""
    new = [folder for folder in out.absolute().parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return new


def _holder(lock: Path) -> str:
    """The process that holds a lock, as its file names it."""
    try:
        pid, host, *_ = lock.read_text().split()
    except (OSError, ValueError):  # made this very moment, or torn when the machine went down
        return f"another process: {lock} names none; if no other command runs, remove that file"
    return f"process {pid} on {host}: wait for it, or give another output ({lock} is its lock)"


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    # Python's default is to die on the spot: temporary folders would stay. Only the main thread may
    # set handlers, and a handler that was set before (of a scheduler, of a test) stays.
    unset = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not unset or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _quiet_orbax() -> None:
    """From now on, keeps orbax from printing tracebacks of the errors that it also raises."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Of several arrays that can't be read or written, the first one raises and closes orbax's event
    # loop. Threads of the others report to it later, some when the command has ended already: so
    # nothing takes this hook away again.
    before = sys.unraisablehook
    if getattr(before, "func", None) is not _unless_loop_closed:
        sys.unraisablehook = functools.partial(_unless_loop_closed, before)


def _unless_loop_closed(before: Callable[[Any], Any], failed: sys.UnraisableHookArgs) -> None:
    if str(failed.exc_value) != "Event loop is closed":
        before(failed)


def error_lines(error: Exception) -> list[str]:
    """A user's error, a line for each problem; one line, cut to a bearable width, for others."""
    found = error if isinstance(error, Problems) else Problems([str(error)])
    return str(found).splitlines() or [type(error).__name__]


def say(message: str) -> None:
    """A line on standard error."""
    print(" ".join(message.split()), file=sys.stderr)
