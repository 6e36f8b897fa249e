"""The keeper of one answer: it confines the answer's process, watches it, and clears up after it.

A keeper is forked from the cradle, a process that was itself forked before any answer or test was
read. So the memory that the answer's process inherits holds no secret: no test, no expected value,
no other answer. A keeper says what the kernel told it: how the answer's process ended, and whether
it took too long or wrote too much.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NoReturn

from eval.sandbox import confine, linux, worker
from eval.sandbox.confine import Limits

POLL_SECONDS = 0.005
END_SECONDS = 0.2
"""How long an answer's process may take to end when it gets no more requests."""


def start_cradle(layers: Collection[str], limits: Limits) -> socket.socket:
    """Forks the cradle and returns the line to it, see `ask_for_keeper`."""
    line, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    if os.fork():
        other_end.close()
        return line
    line.close()
    linux.die_with_parent()
    while True:
        scratch, descriptors, *_ = socket.recv_fds(other_end, 4096, 4)
        if not scratch:
            os._exit(0)
        child = os.fork()
        if child == 0:
            _keep(scratch.decode(), layers, limits, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(child, 0)


def ask_for_keeper(
    line: socket.socket, scratch: str, requests: int, replies: int, status: int, control: int
) -> None:
    """Starts a keeper with an answer's process, which waits for requests.

    Args:
        scratch: an empty folder, where the process may write.
        requests, replies: descriptors for `eval.sandbox.worker.serve`.
        status: where the keeper writes two lines of JSON: {"failure"}, "" when the process is
            confined, before it gets the first request; and at the end {"broken": the limit that
            was exceeded, "end": how the process ended, "output", "failure"}.
        control: when its other end is closed, the keeper ends the process.
    """
    socket.send_fds(line, [scratch.encode()], [requests, replies, status, control])


def _keep(
    scratch: str,
    layers: Collection[str],
    limits: Limits,
    requests: int,
    replies: int,
    status: int,
    control: int,
) -> NoReturn:
    """The keeper's whole life."""
    told = os.fdopen(status, "w")
    try:
        linux.adopt_orphans()
        confine.outside(layers)
        output, output_end = os.pipe()
        setup, setup_end = os.pipe()
        child = os.fork()
        if child == 0:
            descriptors = [_null(), output_end, output_end, requests, replies, setup_end]
            _become_worker(layers, limits, scratch, descriptors)
        # Pipes end when the child does, if this process keeps no end of them.
        for descriptor in (output_end, setup_end, requests, replies):
            os.close(descriptor)
        with open(setup, errors="replace") as pipe:
            failure = pipe.read()
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
    print(json.dumps({"failure": failure}), file=told, flush=True)
    if not failure:
        print(json.dumps(_watch(child, output, control, limits)), file=told, flush=True)
    linux.sweep()
    os._exit(0)


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR)


def place(descriptors: list[int]) -> None:
    """Makes these the descriptors 0, 1, 2, … and closes all others."""
    # Copies above all places, since a place can be the number of another one of these.
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in descriptors]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(len(copies), 1 << 16)


def _become_worker(
    layers: Collection[str], limits: Limits, scratch: str, descriptors: list[int]
) -> NoReturn:
    """Confines this process and serves requests; says on descriptor 5 why it cannot."""
    try:
        # A different user for each keeper, which waits for its worker's end.
        uid = confine.spare_uid()
        place(descriptors)
        os.setsid()
        if "pid_namespace" in layers:
            linux.die_with_parent()
            _fork_below_init()
        # Where memory runs out, the kernel ends this process and not the evaluation.
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        confine.inside(layers, limits, scratch, uid)
        os.close(5)
    except BaseException as error:
        with suppress(OSError):
            os.write(5, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
        os._exit(1)
    worker.serve(requests=3, replies=4)


def _fork_below_init() -> None:
    """Forks once more and returns in the child.

    This process is the init of the pid namespace. It waits for the child and exits with its status.
    """
    child = os.fork()
    if child == 0:
        return
    os.closerange(0, 6)
    status = linux.serve_as_init(child)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _watch(child: int, output: int, control: int, limits: Limits) -> dict[str, Any]:
    watch = _Watch(output, control, limits)
    status = watch.until_end(child)
    cleared = _kill_all(child, status is not None)
    watch.drain()
    return {
        "broken": watch.broken,
        "end": _end(status),
        "output": watch.text.decode("utf-8", "replace"),
        "failure": "" if cleared else "it left processes that cannot be killed",
    }


class _Watch:
    """Reads a child's output and notes whether the child kept its limits.

    Attributes:
        broken: the limit that was exceeded, or "".
        text: the output so far.
    """

    def __init__(self, output: int, control: int, limits: Limits):
        self.output = output
        self.limits = limits
        self.deadline = time.monotonic() + limits.timeout
        self.stop = float("inf")
        self.text = b""
        self.broken = ""
        self.selector = selectors.DefaultSelector()
        for descriptor in (output, control):
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ)

    def until_end(self, child: int) -> int | None:
        """The child's wait status; None where the child still runs and has to be killed."""
        while not self.broken:
            self._read(POLL_SECONDS)
            pid, status = os.waitpid(child, os.WNOHANG)
            now = time.monotonic()
            # On a busy machine the child can hit its CPU limit before this process wakes up.
            if now > self.deadline and (
                not pid or _signal(status) in (signal.SIGKILL, signal.SIGXCPU)
            ):
                self.broken = f"timed out after {self.limits.timeout:g} s"
            if pid:
                return status
            if now > self.stop:
                return None
        return None

    def drain(self) -> None:
        """Reads what is left of the output after the child has ended."""
        while not self.broken and self._read(0):
            pass

    def _read(self, seconds: float) -> bool:
        """Whether there was any output."""
        ready = [key.fd for key, _ in self.selector.select(seconds)]
        for descriptor in ready:
            data = os.read(descriptor, 1 << 16)
            if not data:
                self.selector.unregister(descriptor)
            if descriptor != self.output:
                self.stop = time.monotonic() + END_SECONDS
                continue
            # Bytes beyond the limit are dropped, so a program cannot fill this process's memory.
            room = self.limits.output_bytes - len(self.text)
            self.text += data[:room]
            if len(data) > room:
                self.broken = f"wrote more than {self.limits.output_bytes} bytes"
        return self.output in ready


def _kill_all(child: int, ended: bool) -> bool:
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    if sys.platform == "linux":
        return linux.sweep()
    # Without /proc only the child's own process group can be found.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return True


def _end(status: int | None) -> str:
    """How a process ended; "" where it had to be killed."""
    if status is None:
        return ""
    with suppress(ValueError):
        return f"killed by {signal.Signals(_signal(status)).name}"
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    return f"ended before its tests did, with status {code}"


def _signal(status: int) -> int:
    """The signal that ended a process or the child of an init; 0 for none."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    return max(os.WEXITSTATUS(status) - 128, 0) if os.WIFEXITED(status) else 0
