"""System calls that Python 3.11 has no function for, by ctypes. Arguments: their man pages.

OSError: the kernel refuses. AttributeError: the C library has no such function.
"""

from __future__ import annotations

import ctypes
import os

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
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_NOSUID_NODEV = 2 | 4
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
MOUNT_ATTR_RDONLY_NOSUID = 1 | 2
MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library that sets errno."""
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    """A system call by its number, for those without a function."""
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
    """Fills the maps of a new user namespace: one user and one group, as outside."""
    prctl(PR_SET_DUMPABLE, 1)  # the maps belong to root in a process that cannot be dumped
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_read_only(scratch: str, size: int) -> None:
    """In a new mount namespace: all mounts read-only, and an empty tmpfs over `scratch`."""
    null = None
    call("mount", null, b"/", null, ctypes.c_ulong(MS_REC | MS_PRIVATE), null)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY_NOSUID, 0, 0, 0)
    syscall(
        "mount_setattr",
        MOUNT_SETATTR,
        AT_FDCWD,
        b"/",
        AT_RECURSIVE,
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    options = f"size={size},nr_inodes=4096,mode=1777".encode()
    flags = ctypes.c_ulong(MS_NOSUID_NODEV)
    call("mount", b"tmpfs", os.fsencode(scratch), b"tmpfs", flags, options)


def set_capabilities(kept: int) -> None:
    """Gives up all capabilities but those of the mask `kept`."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable, twice
    call("capset", header, data)
