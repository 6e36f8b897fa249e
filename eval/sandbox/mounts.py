"""A root folder that shows the interpreter and a scratch folder, and nothing else.

The root is an empty file system in memory. Python's library, the system's shared libraries and a
few devices are bound into it, read-only, at the paths that they have outside, so that the program
can import modules, and needs no right to enter the folders above them. There is no /proc, no home
and no /etc. See the kernel's Documentation/filesystems/sharedsubtree.rst, pivot_root(2) and
mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig

from eval.sandbox import linux

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 1 << 18
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
ATTRIBUTE_READ_ONLY, ATTRIBUTE_NOSUID = 1, 2
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SCRATCH = "/tmp"
"""The scratch folder inside of the new root."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


def readable() -> list[str]:
    """Folders and files that a program needs: Python's library, packages, shared libraries."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    python += [os.path.join(p, "lib") for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    found = [p for p in (*python, *LIBRARIES, *FILES, *DEVICES) if os.path.exists(p)]
    # A folder inside another one of the list is there already.
    inside = [p for p in found if any(p.startswith(f"{other}/") for other in found)]
    return [path for path in dict.fromkeys(found) if path not in inside]


def enter_private_root(folder: str, size: int) -> None:
    """Makes a new root at `folder` and moves this process there, into its scratch folder.

    Needs a mount namespace of its own, and the capability to mount in it.

    Args:
        folder: an empty folder.
        size: bytes of all files together that a program may write.
    """
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1024,mode=755")
    scratch = f"{folder}{SCRATCH}"
    os.mkdir(scratch)
    options = f"size={size},nr_inodes=4096,mode=1777"
    _mount("tmpfs", scratch, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    for path in readable():
        _bind(path, folder + path)
    os.chdir(folder)
    machine = os.uname().machine
    if machine not in PIVOT_ROOT:
        raise OSError(f"pivot_root: no number of this call for {machine}")
    # The old root is stacked below the new one, at the same place, and leaves from there.
    linux.syscall("pivot_root", PIVOT_ROOT[machine], b".", b".")
    linux.call("umount2", b".", MNT_DETACH)
    _make_read_only("/", 0)
    os.chdir(SCRATCH)


def _bind(path: str, target: str) -> None:
    """Shows a folder or file at another place, read-only."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(path, target, None, MS_BIND | MS_REC)
    if path not in DEVICES:
        _make_read_only(target, AT_RECURSIVE)


def _make_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(ATTRIBUTE_READ_ONLY | ATTRIBUTE_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    path_ = os.fsencode(path)
    linux.syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, path_, flags, attributes, size)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str = ""
) -> None:
    names = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    linux.call("mount", *names, ctypes.c_ulong(flags), options.encode() or None)
