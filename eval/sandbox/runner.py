"""Runs Python programs that a model wrote, each in its own process, confined in layers.

This process never executes a program. `ask` starts a supervisor, a fresh interpreter with
namespaces and limits on time and output. The supervisor forks a worker, which has rlimits, another
uid, seccomp and Landlock, and executes the program.

The layers keep a program from harming the machine and from outliving its run. They do not
protect the result: the program runs in the interpreter that reports the result, so a program that
is written to forge a pass can do so.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.sandbox.confine import Limits

DEFAULT = Limits()
Program = str | Sequence[str]
"""Source text, or several: each is compiled alone, and they are executed one after the other in one
namespace. So the end of an answer, such as a decorator, takes nothing from the test after it."""
BATCH = 16
GRACE_SECONDS = 60.0
"""Time beyond the programs' own: the interpreter starts, and left-over processes are killed."""


@dataclass(frozen=True)
class Outcome:
    """The result of one program.

    Attributes:
        passed: the program ran to its end without an exception.
        reason: "passed", or the exception, limit or signal that ended the program.
        stdout: stdout and stderr together, in order, up to the limit.
    """

    passed: bool
    reason: str
    stdout: str


def run(
    program: Program,
    timeout: float = DEFAULT.timeout,
    memory_bytes: int = DEFAULT.memory_bytes,
    output_bytes: int = DEFAULT.output_bytes,
    processes: int = DEFAULT.processes,
    unsafe: bool = False,
    layers: Layers | None = None,
) -> Outcome:
    """Executes Python source in a new process, confined by all layers that this machine has.

    Args:
        program: source text, or several in order; tests are assertions.
        timeout: seconds of wall clock from the program's start, and seconds of CPU.
        memory_bytes: limit of the address space.
        output_bytes: limit of stdout and stderr together.
        processes: limit of processes and threads.
        unsafe: run the program even where `Layers.refusal` objects.
        layers: the layers to use; None: all that the machine has.

    Raises:
        ValueError: the layers are too few, and `unsafe` is False.
        SandboxError: the sandbox failed, so that nothing is known about the program.
    """
    limits = DEFAULT._replace(
        timeout=timeout,
        memory_bytes=memory_bytes,
        output_bytes=output_bytes,
        processes=processes,
    )
    return _run_batch([program], limits, unsafe, layers)[0]


def run_many(
    programs: Sequence[Program],
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
    programs: Sequence[Program], limits: Limits, unsafe: bool, layers: Layers | None
) -> list[Outcome]:
    """Runs programs one after the other, each in its own folder and its own processes."""
    layers = layers or probe()
    require(layers, unsafe)
    with tempfile.TemporaryDirectory(prefix="kvjax-run-", ignore_cleanup_errors=True) as folder:
        # Another uid must be able to reach its folder, but not to list those of others.
        os.chmod(folder, 0o711)
        scratch = [os.path.join(os.path.realpath(folder), str(i)) for i in range(len(programs))]
        for path in scratch:
            os.mkdir(path, 0o700)
        job = {
            "programs": [[p] if isinstance(p, str) else list(p) for p in programs],
            "layers": layers.available,
            "limits": limits._asdict(),
            "scratch": scratch,
        }
        # The supervisor keeps each program's time; this limit is for a supervisor that hangs.
        answers = ask(job, len(programs) * limits.timeout + GRACE_SECONDS)
    for answer in answers:
        if answer["failure"]:
            raise SandboxError(answer["failure"])
    return [Outcome(a["passed"], a["reason"], a["stdout"]) for a in answers]


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
        # A program needs one layer against network access and one that protects files.
        lacking = []
        if not have & {"network_namespace", "seccomp"}:
            lacking.append("keeps programs off the network (network_namespace or seccomp)")
        if not have & {"mount_namespace", "landlock", "dropped_root"}:
            lacking.append("protects files (mount_namespace, landlock or dropped_root)")
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


def ask(job: Mapping[str, Any], seconds: float) -> Any:
    """Starts a supervisor, gives it a job and returns its answer.

    Args:
        job: see `eval.sandbox.supervisor`.
        seconds: how long to wait for the answer.

    Raises:
        SandboxError: no answer in that time, or an answer that is not JSON.
    """
    # -I keeps the user's site-packages and PYTHON* variables out of the supervisor.
    command = [sys.executable, "-I", "-c", START, str(ROOT)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=seconds,
            env=ENVIRONMENT,
            cwd="/",
        )
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"the supervisor gave no answer in {seconds:g} s") from error
    except ValueError as error:
        tail = done.stderr.decode("utf-8", "replace")[-500:]
        raise SandboxError(f"the supervisor ended with {done.returncode}: {tail}") from error


@functools.cache
def probe() -> Layers:
    """The layers that this machine has. Each is tried in its own process, once per interpreter."""
    with tempfile.TemporaryDirectory(prefix="kvjax-probe-") as scratch:
        found = ask({"probe": scratch}, 60)
    return Layers(
        available=tuple(name for name, why in found.items() if not why),
        missing={name: why for name, why in found.items() if why},
    )
