"""System calls that Python 3.11 has no function for, and the search for left-over processes.

Arguments are those of the man pages. A function raises OSError where the kernel refuses, and
AttributeError where the C library has no such function.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress

CLONE_THREAD = 0x00010000
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CAPABILITIES = 64
CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Calls a function of the C library that sets errno."""
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    """Calls a system call by its number, for calls without a function in the C library."""
    function = _libc.syscall
    function.restype = ctypes.c_long
    result = function(ctypes.c_long(number), *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: object) -> None:
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    call("prctl", option, *values, *[ctypes.c_ulong(0)] * (4 - len(values)))


def unshare(flags: int) -> None:
    call("unshare", flags)


def map_user(uid: int, gid: int) -> None:
    """Maps one user and one group of a new user namespace to the same ids outside."""
    # In a process that cannot be dumped the map files belong to root.
    prctl(PR_SET_DUMPABLE, 1)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def drop_bounding_set() -> None:
    """Lets no program that this process may ever execute gain a capability."""
    with suppress(OSError):  # the kernel knows fewer, or this process may not
        for number in range(CAPABILITIES):
            prctl(PR_CAPBSET_DROP, number)


def drop_capabilities() -> None:
    """Gives up all capabilities: effective, permitted and inheritable."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def adopt_orphans() -> None:
    """Makes this process the parent of orphans below it, and kills it when its own parent dies."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        die_with_parent()


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies. A change of uid undoes this."""
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve_as_init(worker: int) -> int:
    """Waits as the first process of a pid namespace and returns the worker's wait status.

    When the first process exits, the kernel kills all others of the namespace.
    """
    while True:
        pid, status = os.wait()
        if pid == worker:
            return status


def sweep(seconds: float = 10.0) -> bool:
    """Kills and reaps every process below this one, whatever its session or group.

    All are stopped before any is killed: a stopped process counts against the limit of processes
    and starts no other, so a fork bomb cannot replace the processes that are killed.

    Returns:
        Whether none is left; a subreaper without children has no descendants.
    """
    stopped: set[int] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        found = descendants(os.getpid())
        for pid in found - stopped:
            _send(pid, signal.SIGSTOP)
        if found <= stopped:
            for pid in found:
                _send(pid, signal.SIGKILL)
        stopped |= found
        time.sleep(0.001)
    return False


def descendants(ancestor: int) -> set[int]:
    """Living processes below `ancestor`, by the parents that /proc lists. Linux only."""
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
    """Number of threads that run as `uid`, as RLIMIT_NPROC counts them. Linux only."""
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
