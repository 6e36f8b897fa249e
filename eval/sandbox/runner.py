"""Runs programs that a model wrote, each against its test, confined in layers.

This process never executes a program. It starts a supervisor (eval/sandbox/supervisor.py), a fresh
interpreter, and gives it a batch of answers with their tests. The layers keep an answer from
harming the machine and from outliving its run. The test runs in another process than the answer
and sees values only, so the answer cannot change how it is judged.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.sandbox.confine import Limits
from eval.sandbox.judge import Program
from eval.sandbox.scratch import scratch_folders

DEFAULT = Limits()
BATCH = 16
GRACE_SECONDS = 300.0
"""Time beyond the programs' own: the interpreter starts, and left-over processes are killed."""
LOST = "the sandbox's supervisor ended while the answer ran"


@dataclass(frozen=True)
class Outcome:
    """The result of one program.

    Attributes:
        passed: the answer and its test ran to their ends without an exception.
        reason: "passed", or the exception, limit or signal that ended the answer or the test.
        stdout: stdout and stderr of the answer together, in order, up to the limit.
    """

    passed: bool
    reason: str
    stdout: str


def run(
    program: Program | str,
    timeout: float = DEFAULT.timeout,
    memory_bytes: int = DEFAULT.memory_bytes,
    output_bytes: int = DEFAULT.output_bytes,
    processes: int = DEFAULT.processes,
    unsafe: bool = False,
    layers: Layers | None = None,
) -> Outcome:
    """Executes an answer and its test, confined by all layers that this machine has.

    Args:
        program: an answer with its test; a text is an answer without one.
        timeout: seconds of wall clock from the program's start, and seconds of CPU.
        memory_bytes: limit of the address space.
        output_bytes: limit of stdout and stderr together.
        processes: limit of processes and threads.
        unsafe: run the program even where `Layers.refusal` objects.
        layers: the layers to use; None: all that the machine has.

    Raises:
        ValueError: the layers are too few, and `unsafe` is False.
        SandboxError: the sandbox failed before the program started. Nothing that a program does
            raises it.
    """
    limits = DEFAULT._replace(
        timeout=timeout,
        memory_bytes=memory_bytes,
        output_bytes=output_bytes,
        processes=processes,
    )
    return _run_batch([program], limits, unsafe, layers)[0]


def run_many(
    programs: Sequence[Program | str],
    workers: int | None = None,
    limits: Limits | None = None,
    unsafe: bool = False,
    layers: Layers | None = None,
) -> list[Outcome]:
    """Runs several programs at a time. One supervisor serves a batch of `BATCH` programs.

    Args:
        programs: see `run`.
        workers: number of supervisors at a time; None: the number of processors.
        limits: of each program; None: `DEFAULT`.
        unsafe, layers: see `run`.

    Returns:
        The outcomes, in the order of the programs.

    Raises:
        ValueError, SandboxError: see `run`.
    """
    batches = [programs[start : start + BATCH] for start in range(0, len(programs), BATCH)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done = pool.map(lambda b: _run_batch(b, limits or DEFAULT, unsafe, layers), batches)
        return [outcome for batch in done for outcome in batch]


def _run_batch(
    programs: Sequence[Program | str], limits: Limits, unsafe: bool, layers: Layers | None
) -> list[Outcome]:
    """Runs programs one after the other, each in its own folders and its own processes."""
    layers = layers or probe()
    require(layers, unsafe)
    known = [p if isinstance(p, Program) else Program(p) for p in programs]
    outcomes: list[Outcome] = []
    while len(outcomes) < len(known):
        outcomes += _attempt(known[len(outcomes) :], limits, layers)
    return outcomes


def _attempt(programs: Sequence[Program], limits: Limits, layers: Layers) -> list[Outcome]:
    """The outcomes of the first programs, one at least: all, unless the supervisor is killed."""
    settings = {"layers": layers.available, "limits": limits._asdict()}
    # The supervisor keeps each program's time; this limit is for a supervisor that hangs.
    seconds = len(programs) * (limits.timeout + 1) + GRACE_SECONDS
    with scratch_folders(len(programs)) as pairs:
        jobs = [{"program": p, "scratch": s} for p, s in zip(programs, pairs, strict=True)]
        found, error = ask(settings, jobs, seconds)
    outcomes, started = [], False
    for message in found:
        started = "started" in message
        if message.get("failure"):
            raise SandboxError(message["failure"])
        if not started:
            outcomes.append(Outcome(message["passed"], message["reason"], message["stdout"]))
    # The program may have caused the end, so it is wrong, and the others run without it.
    if started:
        return [*outcomes, Outcome(False, LOST, "")]
    if not outcomes:
        raise SandboxError(error or "the supervisor gave no answer")
    return outcomes


def require(layers: Layers, unsafe: bool) -> None:
    """Raises ValueError where the layers are too few and the caller did not ask for unsafe runs."""
    why = layers.refusal()
    if why and not unsafe:
        raise ValueError(why)


ROOT = Path(__file__).parents[2]
START = (
    "import sys; root = sys.argv[1]; sys.path.insert(0, root); "
    "from eval.sandbox.supervisor import main; sys.path.remove(root); main()"
)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
"""The whole environment of a program. Tokens and proxies of this process stay out of it."""


ENOUGH = {
    "keeps programs off the network": ("network_namespace", "seccomp"),
    "keeps programs from files": ("mount_namespace", "landlock and seccomp"),
    "keeps programs from other processes": ("pid_namespace", "seccomp"),
}
"""What must be prevented → the layers that prevent it, each alone or together with another."""


class SandboxError(RuntimeError):
    """The sandbox itself failed; nothing is known about the program."""


@dataclass(frozen=True)
class Layers:
    """The layers that confine a program.

    Attributes:
        available: names from `eval.sandbox.confine.LAYERS`.
        missing: the other names, each with the reason why the layer is missing.
    """

    available: tuple[str, ...]
    missing: Mapping[str, str]

    def without(self, *names: str) -> Layers:
        """These layers without the named ones, which count as missing."""
        unknown = set(names) - set(self.available) - set(self.missing)
        if unknown:
            raise ValueError(f"no such layer: {', '.join(sorted(unknown))}")
        kept = tuple(name for name in self.available if name not in names)
        off = {name: "switched off" for name in names if name in self.available}
        return replace(self, available=kept, missing={**self.missing, **off})

    def refusal(self) -> str | None:
        """Why these layers are too few to run a program; None where they suffice."""
        have = set(self.available)
        lacking = [
            f"{purpose} ({' or '.join(names)})"
            for purpose, names in ENOUGH.items()
            if not any(have.issuperset(together.split(" and ")) for together in names)
        ]
        if not lacking:
            return None
        reasons = "; ".join(f"{name}: {why}" for name, why in self.missing.items())
        return (
            f"nothing here {', and nothing '.join(lacking)}. Missing are {reasons}. "
            "--unsafe-execution runs what the model wrote all the same"
        )

    def describe(self) -> str:
        """One line for each layer."""
        lines = [f"{name}: on" for name in self.available]
        return "\n".join(lines + [f"{name}: off ({why})" for name, why in self.missing.items()])


def ask(
    settings: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], seconds: float
) -> tuple[list[Any], str]:
    """Starts a supervisor and gives it jobs, see `eval.sandbox.supervisor.main`.

    Args:
        seconds: how long to wait for its end.

    Returns:
        The messages that it wrote, and how it ended where there is something wrong.
    """
    # -I keeps the user's site-packages and PYTHON* variables out of the supervisor.
    command = [sys.executable, "-I", "-c", START, str(ROOT), json.dumps(settings)]
    try:
        done = subprocess.run(
            command,
            input="".join(json.dumps(job) + "\n" for job in jobs).encode(),
            capture_output=True,
            timeout=seconds,
            env=ENVIRONMENT,
            cwd="/",
        )
        text, error = done.stdout, ""
        if done.returncode:
            tail = done.stderr.decode("utf-8", "replace")[-500:]
            error = f"the supervisor ended with {done.returncode}: {tail}"
    except subprocess.TimeoutExpired as late:
        text, error = late.stdout or b"", f"the supervisor did not end in {seconds:g} s"
    # A killed supervisor may have written a part of a line.
    return [json.loads(line) for line in text.splitlines(keepends=True) if b"\n" in line], error


@functools.cache
def probe() -> Layers:
    """The layers that this machine has. Each is tried in its own process, once per interpreter.

    Raises:
        SandboxError: the supervisor did not say.
    """
    with scratch_folders(1) as ((scratch, _),):
        os.chmod(scratch, 0o711)
        found, error = ask({"probe": scratch}, [], 60)
    if error or not found:
        raise SandboxError(error or "the supervisor gave no answer")
    return Layers(
        available=tuple(name for name, why in found[0].items() if not why),
        missing={name: why for name, why in found[0].items() if why},
    )
