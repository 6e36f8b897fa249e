"""Leaving no process behind: children that were orphaned come to us, and are found in /proc."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

from eval.sandbox import linux


def adopt_orphans() -> None:
    """Processes below this one become its children when their parent dies. Dies with its own."""
    if sys.platform == "linux":
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        die_with_parent()


def die_with_parent() -> None:
    """Has to be said again after a change of uid."""
    if sys.platform == "linux":
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)


def serve_as_init(worker: int) -> int:
    """First process of a pid namespace: the worker's wait status; the rest dies with this one."""
    while True:
        pid, status = os.wait()
        if pid == worker:
            return status


def sweep(seconds: float = 10.0) -> bool:
    """Kills and reaps every process below this one, whatever its session or group.

    They are stopped before they are killed: a stopped process counts against the limit of
    processes and starts no other, so that a fork bomb cannot refill what is killed.

    Returns:
        Whether none is left; a subreaper without children has no descendants.
    """
    stopped: set[int] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = descendants(os.getpid())
        for pid in found - stopped:
            _send(pid, signal.SIGSTOP)
        if found <= stopped:
            for pid in found:
                _send(pid, signal.SIGKILL)
        stopped |= found
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.001)
    return False


def descendants(ancestor: int) -> set[int]:
    """Living processes below one, from the parents that /proc gives. Linux."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, _listdir("/proc")):
        with suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(name))
    found: set[int] = set()
    frontier = [ancestor]
    while frontier:
        new = children.get(frontier.pop(), [])
        found.update(new)
        frontier += new
    return found


def count_of_user(uid: int) -> int:
    """Threads that run as `uid`, which is what RLIMIT_NPROC counts. Linux."""
    total = 0
    for name in filter(str.isdigit, _listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                total += len(os.listdir(f"/proc/{name}/task"))
    return total


def _listdir(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
