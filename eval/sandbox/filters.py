"""The kernel's filters on a process: seccomp for system calls, Landlock for files.

seccomp refuses sockets, new processes, exec, access to other processes, and changes of files that
Landlock does not know. The filter is classic
BPF over `struct seccomp_data` (nr, arch, instruction_pointer, args[6]), see the kernel's
Documentation/userspace-api/seccomp_filter.rst. Call numbers are those of asm/unistd.

Landlock allows reading Python's own files, and writing below one folder or nowhere, see the
kernel's Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os

from eval.sandbox import linux, mounts

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine → its column in the tables, AUDIT_ARCH."""

DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),  # makes sockets and opens files without those calls
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "unshare": (272, 97),  # a new user namespace would give capabilities back
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),  # memory that no rlimit counts, as the next four
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # Landlock lets an owner change the mode, the dates and the attributes of any file.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "truncate": (76, 45),  # Landlock knows it from version 3
    # These act on other processes of the same user.
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    # No capability is left that these need. They stay out of reach all the same.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
}
"""Calls that fail with EPERM: their numbers on each machine; None: the machine lacks the call."""

CLONE = (56, 220)
CLONE3 = (435, 435)
KILL, TGKILL, PRLIMIT, PRCTL = (62, 129), (234, 131), (302, 261), (157, 167)

X32 = 0x40000000
MODE_FILTER = 2
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jump_true", ctypes.c_ubyte),
        ("jump_false", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


Code = list[tuple[int, int, int, int]]


def install_seccomp() -> None:
    """Installs the filter for this thread and all that it starts. Needs no_new_privs.

    Raises:
        OSError: the kernel lacks seccomp, or the machine's call numbers are not in the tables.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"seccomp: no table of system calls for {machine}")
    code = seccomp_program(*ARCHITECTURES[machine], os.getpid())
    instructions = (_Instruction * len(code))(*code)
    linux.prctl(linux.PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(_Program(len(code), instructions)))


def seccomp_program(column: int, architecture: int, pid: int) -> Code:
    """The filter as (code, jump if true, jump if false, k)."""
    refuse = (RETURN, 0, 0, REFUSE | errno.EPERM)
    code = [
        (LOAD, 0, 0, 4),
        # Another architecture's calls have other numbers, which these tables would misread.
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, X32),
        refuse,
        (EQUAL, 0, 1, CLONE3[column]),  # its flags are in memory; the C library then uses clone
        (RETURN, 0, 0, REFUSE | errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        if numbers[column] is not None:
            code += [(EQUAL, 0, 1, numbers[column]), refuse]
    threads_only = (ANY_BIT, 0, 1, linux.CLONE_THREAD)
    for number, allowed in (
        (CLONE, threads_only),
        (KILL, (EQUAL, 0, 1, pid)),
        (TGKILL, (EQUAL, 0, 1, pid)),
        (PRLIMIT, (EQUAL, 0, 1, 0)),
        # The signal at a parent's death stays.
        (PRCTL, (EQUAL, 1, 0, linux.PR_SET_PDEATHSIG)),
    ):
        first_argument = (LOAD, 0, 0, 16)
        code += [(EQUAL, 0, 4, number[column]), first_argument, allowed]
        code += [(RETURN, 0, 0, ALLOW), refuse]
    return [*code, (RETURN, 0, 0, ALLOW)]


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


def landlock_version() -> int:
    """The version of the kernel's interface. Raises OSError where the kernel lacks Landlock."""
    return linux.syscall("landlock", CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def restrict_files(scratch: str | None) -> None:
    """Restricts this thread and all that it starts to Python's files and to one folder.

    Needs no_new_privs.

    Args:
        scratch: the folder; None: nothing can be written.
    """
    found = landlock_version()
    every = (1 << RIGHTS[min(found, len(RIGHTS)) - 1]) - 1
    fields = [every]
    if found >= 4:
        fields.append(NETWORK)
    if found >= 6:
        fields.append(SCOPES)
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    rules = linux.syscall("landlock_create_ruleset", CREATE_RULESET, attributes, size, 0)
    if scratch is not None:
        _allow(rules, scratch, every & ~EXECUTE & ~DEVICES_AND_SOCKETS)
    for path in mounts.readable():
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        _allow(rules, path, rights | WRITE_FILE if path == os.devnull else rights)
    linux.syscall("landlock_restrict_self", RESTRICT_SELF, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.byref(_Beneath(rights, folder))
    linux.syscall("landlock_add_rule", ADD_RULE, rules, PATH_BENEATH, rule, 0)
    os.close(folder)
