"""How the layers are put on: namespaces in the supervisor, the others in the worker."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from eval.sandbox import filters, linux, mounts

LAYERS = (
    "user_namespace",
    "network_namespace",
    "pid_namespace",
    "mount_namespace",
    "dropped_root",
    "no_new_privs",
    "landlock",
    "seccomp",
    "rlimits",
)
"""Names of the layers, in the order in which they are put on."""

NAMESPACES = {
    "network_namespace": linux.CLONE_NEWNET | linux.CLONE_NEWIPC,
    "pid_namespace": linux.CLONE_NEWPID,
}

NOBODY = 65534


class Limits(NamedTuple):
    """The resources that one program may use.

    Attributes:
        timeout: seconds of wall clock, and seconds of CPU.
        memory_bytes: size of the address space.
        output_bytes: bytes of stdout and stderr together; a program that writes more is killed.
        file_bytes: size of all files together. Without a mount namespace, Landlock forbids files,
            and without both this is the size of one file.
        processes: processes and threads, where seccomp does not forbid processes altogether.
        open_files: open descriptors.
    """

    timeout: float = 10.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16
    file_bytes: int = 1 << 24
    processes: int = 32
    open_files: int = 64


def outside(layers: Collection[str]) -> None:
    """Puts this process into namespaces, except for the mount namespace.

    A new pid namespace holds for the children only. The mount namespace comes last, see `inside`:
    this process still needs /proc to find what a program leaves behind.
    """
    flags = sum(NAMESPACES[name] for name in NAMESPACES if name in layers)
    if "user_namespace" in layers:
        user, group = os.geteuid(), os.getegid()
        linux.unshare(linux.CLONE_NEWUSER | flags)
        linux.map_user(user, group)
    elif flags:
        linux.unshare(flags)


def inside(layers: Collection[str], limits: Limits, scratch: str, uid: int) -> None:
    """Puts all other layers on this process, with `scratch` as its working directory.

    None of the layers can be taken off. No capability is left.

    Raises:
        OSError: the kernel refuses a layer.
    """
    if "rlimits" in layers:
        # The kernel counts processes per user, and this user may run others.
        own_count = "user_namespace" in layers or drops_root(layers)
        others = 0 if own_count else linux.count_of_user(os.getuid())
        set_limits(limits, others)
    if sys.platform == "linux":
        linux.drop_bounding_set()
    if drops_root(layers):
        os.chown(scratch, uid, uid)
    if "mount_namespace" in layers:
        linux.unshare(linux.CLONE_NEWNS)
        mounts.enter_private_root(scratch, limits.file_bytes)
    else:
        os.chdir(scratch)
    if drops_root(layers):
        drop_root(uid)
    if {"user_namespace", "no_new_privs", "dropped_root"} & set(layers):
        # Root and a user namespace give all capabilities; the program needs none.
        linux.drop_capabilities()
    linux.die_with_parent()
    if "no_new_privs" in layers:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in layers:
        # Without a file system of its own, a program could fill the disk with files.
        filters.restrict_files("." if "mount_namespace" in layers else None)
    if "seccomp" in layers:
        filters.install_seccomp()


def set_limits(limits: Limits, others: int) -> None:
    """Sets the rlimits. `others`: processes that count against the same limit of processes."""
    seconds = math.ceil(limits.timeout)
    for name, value in {
        "AS": limits.memory_bytes,
        "CPU": seconds,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files,
        "NPROC": limits.processes + others,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # macOS refuses some of the limits.
        with suppress(*(() if sys.platform == "linux" else (OSError, ValueError))):
            resource.setrlimit(number, (value, value))


def drops_root(layers: Collection[str]) -> bool:
    """Whether a program runs as another user than root.

    Where only root can enter Python's folder, another user could import nothing, unless a mount
    namespace shows the library elsewhere. The program then stays root, without capabilities, and
    Landlock and seccomp keep it from root's files.
    """
    shown = "mount_namespace" in layers
    return "dropped_root" in layers and (shown or all(map(others_reach, mounts.readable())))


def drop_root(uid: int) -> None:
    """Changes the user and the group to `uid`, without other groups."""
    # Groups first: without root they cannot be changed any more.
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def spare_uid() -> int:
    """A uid that no user has, so that its limit of processes counts this sandbox only."""
    uid = 0x70000000 + os.getpid()
    with suppress(OSError), open("/proc/self/uid_map") as file:
        for line in file:
            first, _, count = map(int, line.split())
            if first <= uid < first + count:
                return uid
    return NOBODY


def others_reach(folder: str) -> bool:
    """Whether every user may enter a folder, or the folder of a file."""
    folder = os.path.realpath(folder)
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    while folder != "/":
        if not os.stat(folder).st_mode & 0o001:
            return False
        folder = os.path.dirname(folder)
    return True
