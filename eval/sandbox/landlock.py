"""Landlock: files are written below one folder only, and read only where Python's own files are.

The kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import sys

from eval.sandbox import linux

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
DEVICES_AND_SOCKETS = 1 << 6 | 1 << 9 | 1 << 11
RIGHTS = (13, 14, 15, 15, 16)
"""File rights that version 1, 2, … of the interface knows."""
NETWORK = 0b11
"""Bind and connect TCP, from version 4."""
SCOPES = 0b11
"""Abstract sockets and signals, from version 6."""


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """Of the interface. Raises OSError where there is none."""
    return linux.syscall("landlock", CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def restrict(scratch: str) -> None:
    """Restricts this thread from here on, and what it starts. Needs no_new_privs."""
    found = version()
    every = (1 << RIGHTS[min(found, len(RIGHTS)) - 1]) - 1
    fields = [every]
    if found >= 4:
        fields.append(NETWORK)
    if found >= 6:
        fields.append(SCOPES)
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    rules = linux.syscall("landlock_create_ruleset", CREATE_RULESET, attributes, size, 0)
    _allow(rules, scratch, every & ~EXECUTE & ~DEVICES_AND_SOCKETS)
    _allow(rules, "/dev/null", READ_FILE | WRITE_FILE)
    for path in readable():
        _allow(rules, path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE)
    linux.syscall("landlock_restrict_self", RESTRICT_SELF, rules, 0)
    os.close(rules)


def readable() -> list[str]:
    """Where the interpreter, its packages and the libraries they need are."""
    paths = [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64"]
    paths += ["/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _allow(rules: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.byref(_Beneath(rights, folder))
    linux.syscall("landlock_add_rule", ADD_RULE, rules, PATH_BENEATH, rule, 0)
    os.close(folder)
