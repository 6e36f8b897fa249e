"""The supervisor, a fresh interpreter that examines answers one after the other.

For each answer there are two processes that share two pipes and nothing else:

    supervisor ── cradle ── keeper ── worker: executes the answer        (keeper.py, worker.py)
        └──────── judge: executes the test, asks the worker for values   (judge.py)

The verdict is the judge's. The keeper adds limits that the answer exceeded, and how it ended.
Neither has it from the answer's process. What goes wrong before the answer's first line is the
sandbox's failure and an error; what goes wrong afterwards is a failed answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NoReturn

from eval.sandbox import confine, judge, keeper, linux
from eval.sandbox.confine import Limits
from eval.sandbox.judge import Program

SETUP_SECONDS = 120.0
"""How long it may take until a process is confined, and until all its processes are killed."""
SLACK_SECONDS = 1.0
"""Time that a test has beyond its answer's, which the keeper counts from an earlier moment."""


def main() -> None:
    """Reads settings from the command line and programs from stdin, each a line of JSON.

    Settings are {"layers", "limits"}, programs {"program", "scratch": two empty folders}. For
    each program there are two lines on stdout: {"started": true}, and {"passed", "reason",
    "stdout"}. Where the sandbox fails, there is {"failure": why} in their place.

    Settings {"probe": a folder} give {layer: why it is missing, or ""}.
    """
    settings = json.loads(sys.argv[2])
    linux.adopt_orphans()
    if "probe" in settings:
        _say({name: probe(name, settings["probe"]) for name in confine.LAYERS})
        return
    layers, limits = settings["layers"], Limits(**settings["limits"])
    # Forked before stdin is read: an answer's process inherits its memory.
    cradle = keeper.start_cradle(layers, limits)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        program = Program(*job["program"])
        _say(examine(program, cradle, layers, limits, *job["scratch"]))
    cradle.close()
    linux.sweep()


def _say(message: object) -> None:
    print(json.dumps(message), flush=True)


def examine(
    program: Program,
    cradle: socket.socket,
    layers: Collection[str],
    limits: Limits,
    scratch: str,
    judge_scratch: str,
) -> dict[str, Any]:
    """Starts an answer's process and its judge, and returns what they came to."""
    # Each is a pair: the end to read, the end to write.
    requests, replies, status, control, verdict = (os.pipe() for _ in range(5))
    theirs = (requests[0], replies[1], status[1], control[0])
    keeper.ask_for_keeper(cradle, scratch, *theirs)
    _close(*theirs)
    kept, judged = _Lines(status[0]), _Lines(verdict[0])
    failure = kept.next(SETUP_SECONDS).get("failure", "the keeper of an answer did not start")
    found, late = {}, False
    if not failure:
        _say({"started": True})
        child = os.fork()
        if child == 0:
            ends = [requests[1], replies[0], verdict[1]]
            _become_judge(program, layers, limits, judge_scratch, ends)
        _close(verdict[1])
        failure = judged.next(SETUP_SECONDS).get("failure", "the process of a test did not start")
        found = judged.next(limits.timeout + SLACK_SECONDS)
        late = judged.late
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _close(requests[1], replies[0], control[1])
    end = kept.next(SETUP_SECONDS)
    _close(status[0], verdict[0])
    return {"failure": failure} if failure else _outcome(found, late, end, limits)


def _outcome(
    found: dict[str, Any], late: bool, end: dict[str, Any], limits: Limits
) -> dict[str, Any]:
    """The result of an answer from what its judge and its keeper said, either of them perhaps {}.

    Args:
        late: the judge said nothing in time.
    """
    trouble = str(end.get("broken") or end.get("failure", "its keeper ended"))
    if late and not trouble:
        trouble = f"timed out after {limits.timeout:g} s"
    passed = found.get("passed") is True and not trouble
    reason = str(found.get("reason") or "the test ended without a verdict")
    if found.get("ended"):
        reason = str(end.get("end") or reason)
    return {
        "passed": passed,
        "reason": "passed" if passed else trouble or reason,
        "stdout": str(end.get("output", "")),
    }


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Lines:
    """Lines of JSON from a process that may end or hang.

    Attributes:
        late: a line did not come in time.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.rest = b""
        self.late = False

    def next(self, seconds: float) -> dict[str, Any]:
        """The next line's object; {} where there is none, or in its place something else."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                self.late = True
                return {}
            data = os.read(self.descriptor, 1 << 16)
            if not data:
                return {}
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
        return {}


def _become_judge(
    program: Program, layers: Collection[str], limits: Limits, scratch: str, ends: list[int]
) -> NoReturn:
    """Confines this process as the answer's is, executes the test, and writes two lines.

    Args:
        ends: descriptors for requests, replies, and the lines: {"failure"}, and the verdict.
    """
    failure = ""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        keeper.place([null, null, null, *ends])
        uid = confine.spare_uid()
        own = [name for name in layers if name != "pid_namespace"]
        confine.outside(own)
        confine.inside(own, limits, scratch, uid)
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
    for line in ({"failure": failure}, {} if failure else judge.judge(program, 3, 4)):
        os.write(5, json.dumps(line).encode() + b"\n")
    os._exit(0)


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
    if name.endswith("_namespace") and not root:
        layers.add("user_namespace")
    if name in ("landlock", "seccomp"):
        layers.add("no_new_privs")
    # `dropped_root` changes the folder's owner, so each layer gets another folder.
    own = os.path.join(scratch, name)
    os.mkdir(own)
    return _in_child(lambda: _try(layers, own))


def _try(layers: Collection[str], scratch: str) -> None:
    """Puts layers on this process, which must still be able to import modules."""
    uid = confine.spare_uid()
    confine.outside(layers)
    confine.inside(layers, Limits(), scratch, uid)
    with open(os.__file__):
        pass


def _in_child(function: Callable[[], None]) -> str:
    """Calls a function in a forked child: the exception that it raised, or "".

    A process cannot leave a namespace again, so the calls that enter one happen in a child.
    """
    end, other_end = os.pipe()
    child = os.fork()
    if child == 0:
        failure = "ok"
        try:
            function()
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
        os.write(other_end, failure.encode("utf-8", "replace"))
        os._exit(0)
    os.close(other_end)
    with open(end, errors="replace") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return "" if text == "ok" else text or "the kernel killed the attempt"
