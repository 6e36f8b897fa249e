"""The supervisor, a fresh interpreter that runs programs one after the other, and its worker.

`main` reads a job as JSON from stdin. For each of the job's programs, which are lists of sources,
it writes {"passed", "reason", "stdout", "failure"} to stdout; for a job with "probe", {layer: why
it is missing, or ""}. The worker is a forked child that confines itself and executes one program.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
import types
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NoReturn

from eval.sandbox import confine, linux
from eval.sandbox.confine import Limits

POLL_SECONDS = 0.005
RESULT_BYTES = 1 << 14


def main() -> None:
    job = json.load(sys.stdin)
    linux.die_with_parent()
    if "probe" in job:
        answer: object = {name: probe(name, job["probe"]) for name in confine.LAYERS}
    else:
        limits = Limits(**job["limits"])
        answer = [
            json.loads(in_child(supervise, program, job["layers"], limits, scratch))
            for program, scratch in zip(job["programs"], job["scratch"], strict=True)
        ]
    print(json.dumps(answer))


def in_child(function: Callable[..., object], *arguments: object) -> str:
    """Calls a function in a forked child and returns its result as JSON.

    A process cannot leave a namespace again, so the calls that enter one happen in a child.
    """
    end, other_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function(*arguments)
        except BaseException as error:
            answer = {"failure": f"{type(error).__name__}: {error}"}
        with open(other_end, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(other_end)
    with open(end) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text or '{"failure": "the kernel killed the attempt"}'


def supervise(
    program: list[str], layers: list[str], limits: Limits, scratch: str
) -> dict[str, Any]:
    """Starts the worker, watches it, and kills every process that it leaves behind.

    Raises:
        OSError: the kernel refuses a namespace.
    """
    linux.adopt_orphans()
    uid = confine.spare_uid()
    # A program that exits early never learns the token that stands for a pass.
    token = os.urandom(16).hex()
    confine.outside(layers, limits, scratch, uid)
    output, output_end = os.pipe()
    result, result_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if "pid_namespace" in layers:
            linux.die_with_parent()
            _fork_below_init((output_end, result_end))

        def put_on() -> None:
            confine.inside(layers, limits, uid)

        work(program, put_on, output_end, result_end, token)
    # The pipes end when the child does, if this process keeps no writing end.
    os.close(output_end)
    os.close(result_end)
    watch = _Watch(output, result, limits)
    status = watch.until_end(child)
    failure = "" if _kill_all(child, status is not None) else "processes are left"
    watch.drain()
    answer = watch.answer()
    passed = not watch.broken and answer.get("passed") == token
    return {
        "passed": passed,
        "reason": "passed" if passed else watch.broken or answer.get("reason") or _end(status),
        "stdout": watch.text.decode("utf-8", "replace"),
        "failure": answer.get("setup") or failure,
    }


class _Watch:
    """Reads a child's two pipes and notes whether the child kept its limits.

    Attributes:
        broken: the limit that was exceeded, or "".
        written: the bytes of each pipe so far.
    """

    def __init__(self, output: int, result: int, limits: Limits):
        self.output = output
        self.limits = limits
        self.deadline = time.monotonic() + limits.timeout
        self.written = {output: b"", result: b""}
        self.most = {output: limits.output_bytes, result: RESULT_BYTES}
        self.broken = ""
        self.selector = selectors.DefaultSelector()
        for descriptor in self.written:
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ)

    @property
    def text(self) -> bytes:
        return self.written[self.output]

    def until_end(self, child: int) -> int | None:
        """The child's wait status; None where the child exceeded a limit and still runs."""
        while not self.broken:
            self._read(POLL_SECONDS)
            pid, status = os.waitpid(child, os.WNOHANG)
            late = time.monotonic() > self.deadline
            # On a busy machine the child can hit its CPU limit before this process wakes up.
            if late and (not pid or _signal(status) in (signal.SIGKILL, signal.SIGXCPU)):
                self.broken = f"timed out after {self.limits.timeout:g} s"
            if pid:
                return status
        return None

    def drain(self) -> None:
        """Reads what is left in the pipes after the child has ended."""
        while not self.broken and self.selector.get_map():
            if not self._read(0):
                return

    def answer(self) -> dict[str, str]:
        (result,) = (text for end, text in self.written.items() if end != self.output)
        with suppress(ValueError):
            found = json.loads(result)
            if isinstance(found, dict):
                return found
        return {}

    def _read(self, seconds: float) -> bool:
        ready = self.selector.select(seconds)
        for key, _ in ready:
            data = os.read(key.fd, 1 << 16)
            if not data:
                self.selector.unregister(key.fd)
            # Bytes beyond the limit are dropped, so a program cannot fill this process's memory.
            room = self.most[key.fd] - len(self.written[key.fd])
            self.written[key.fd] += data[:room]
            if len(data) > room:
                self.broken = f"wrote more than {self.most[key.fd]} bytes"
        return bool(ready)


def _fork_below_init(descriptors: Collection[int]) -> None:
    """Forks once more and returns in the child.

    This process is the init of the pid namespace. It waits for the child and exits with its status.
    """
    child = os.fork()
    if child == 0:
        return
    for descriptor in descriptors:
        os.close(descriptor)
    status = linux.serve_as_init(child)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _kill_all(child: int, ended: bool) -> bool:
    if not ended:
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
    """How a process without a result ended."""
    if status is None:
        return "killed"
    with suppress(ValueError):
        return f"killed by {signal.Signals(_signal(status)).name}"
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    return f"ended before its tests did, with status {code}"


def _signal(status: int) -> int:
    """The signal that ended a process or the child of an init; 0 for none."""
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    return max(os.WEXITSTATUS(status) - 128, 0) if os.WIFEXITED(status) else 0


def probe(name: str, scratch: str) -> str:
    """Tries one layer and the layers that it needs in a child: why it is missing, or ""."""
    root = os.geteuid() == 0
    if name != "rlimits" and sys.platform != "linux":
        return "Linux only"
    if name == "user_namespace" and root:
        return "not needed: root makes the other namespaces itself"
    if name == "dropped_root" and not root:
        return "not needed: not root"
    layers = {name}
    if name in confine.NAMESPACES and not root:
        layers.add("user_namespace")
    if name in ("landlock", "seccomp"):
        layers.add("no_new_privs")
    # `dropped_root` changes the folder's owner, so each layer gets another folder.
    own = os.path.join(scratch, name)
    os.mkdir(own)
    return json.loads(in_child(_put_on, layers, own))["failure"]


def _put_on(layers: Collection[str], scratch: str) -> dict[str, str]:
    uid = confine.spare_uid()
    confine.outside(layers, Limits(), scratch, uid)
    confine.inside(layers, Limits(), uid)
    return {"failure": ""}


REASON_CHARACTERS = 500


def work(
    program: list[str], put_on: Callable[[], None], output: int, result: int, token: str
) -> NoReturn:
    """Confines this process, executes `program` as __main__, and ends.

    Args:
        program: sources, which share a namespace. All are compiled before the first one runs. The
            program passes when they run to their end without an exception, SystemExit among them.
        put_on: confines this process; raises OSError when it cannot.
        output: descriptor for stdout and stderr.
        result: descriptor for one line of JSON: {"setup": why it did not start}, {"reason": …},
            or {"passed": token}, which a program that merely exits does not write.
        token: of this run.
    """
    # Bound here: the program can replace every one of these names.
    write, dumps, leave, getpid, execute = os.write, json.dumps, os._exit, os.getpid, exec
    worker = getpid()
    try:
        result = _rewire(output, result)
        put_on()
    except BaseException as error:
        write(result, dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        leave(1)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    try:
        # All are compiled before the first one runs, and without this file's __future__ imports.
        codes = [compile(s, "<program>", "exec", dont_inherit=True) for s in program]
        for code in codes:
            execute(code, module.__dict__)
        answer = {"passed": token}
    except BaseException as error:
        answer = {"reason": _describe(error)}
    if getpid() != worker:  # a fork of the program came to its end: not a result
        leave(0)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the program closed or replaced them
        pass
    write(result, dumps(answer).encode())
    leave(0)


def _rewire(output: int, result: int) -> int:
    """Leaves four descriptors: an empty stdin, the output as stdout and stderr, the result as 3."""
    result = os.dup(result)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if result != 3:
        os.dup2(result, 3)
    os.closerange(4, 1 << 16)
    return 3


def _describe(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text.removesuffix(": ")[:REASON_CHARACTERS]
