"""Runs programs in the sandbox, from a process that never executes them itself."""

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
BATCH = 16
GRACE_SECONDS = 60.0
"""For the interpreter to start and for what is left to be killed, beyond the programs' own time."""


@dataclass(frozen=True)
class Outcome:
    """Of one program.

    Attributes:
        passed: it ran to its end without an exception.
        reason: "passed", the exception, the limit or the signal that ended it.
        stdout: and stderr, as they came, up to the limit.
    """

    passed: bool
    reason: str
    stdout: str


def run(
    program: str,
    timeout: float = DEFAULT.timeout,
    memory_bytes: int = DEFAULT.memory_bytes,
    output_bytes: int = DEFAULT.output_bytes,
    processes: int = DEFAULT.processes,
    unsafe: bool = False,
    layers: Layers | None = None,
) -> Outcome:
    """Executes Python source in a process of its own, confined as far as this machine can.

    Args:
        program: source text; tests are part of it, as assertions.
        timeout: seconds of wall clock from its start, and of CPU.
        memory_bytes: of address space.
        output_bytes: of stdout and stderr.
        processes: and threads.
        unsafe: runs it also where `Layers.refusal` has an objection.
        layers: None: all that there are.

    Raises:
        ValueError: refused.
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
    programs: Sequence[str],
    workers: int | None = None,
    limits: Limits | None = None,
    unsafe: bool = False,
    layers: Layers | None = None,
) -> list[Outcome]:
    """Runs several at a time; each worker's interpreter starts once for a batch of them.

    Args:
        programs: source texts.
        workers: at a time; None: as many as there are processors.
        limits: of each program; None: the usual ones.
        unsafe, layers: see `run`.

    Returns:
        Their outcomes, in their order.

    Raises:
        ValueError, SandboxError: see `run`.
    """
    batches = [programs[start : start + BATCH] for start in range(0, len(programs), BATCH)]
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        done = pool.map(lambda b: _run_batch(b, limits or DEFAULT, unsafe, layers), batches)
        return [outcome for batch in done for outcome in batch]


def _run_batch(
    programs: Sequence[str], limits: Limits, unsafe: bool, layers: Layers | None
) -> list[Outcome]:
    """One after the other, each in a folder and with processes of its own."""
    layers = layers or probe()
    require(layers, unsafe)
    with tempfile.TemporaryDirectory(prefix="kvjax-run-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o711)
        scratch = [os.path.join(os.path.realpath(folder), str(i)) for i in range(len(programs))]
        for path in scratch:
            os.mkdir(path, 0o700)
        job = {
            "programs": list(programs),
            "layers": layers.available,
            "limits": limits._asdict(),
            "scratch": scratch,
        }
        answers = ask(job, len(programs) * limits.timeout + GRACE_SECONDS)
    for answer in answers:
        if answer["failure"]:
            raise SandboxError(answer["failure"])
    return [Outcome(a["passed"], a["reason"], a["stdout"]) for a in answers]


def require(layers: Layers, unsafe: bool) -> None:
    """Raises ValueError where these layers are too few and it was not asked for all the same."""
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
"""All that a program sees of the environment: no tokens, no proxies."""


class SandboxError(RuntimeError):
    """The sandbox itself failed; says nothing about the program."""


@dataclass(frozen=True)
class Layers:
    """What confines a program.

    Attributes:
        available: names out of `eval.sandbox.confine.LAYERS`.
        missing: the others, each with the reason.
    """

    available: tuple[str, ...]
    missing: Mapping[str, str]

    def without(self, *names: str) -> Layers:
        """The same but for some."""
        unknown = set(names) - set(self.available) - set(self.missing)
        if unknown:
            raise ValueError(f"no such layer: {', '.join(sorted(unknown))}")
        kept = tuple(name for name in self.available if name not in names)
        off = {name: "switched off" for name in names if name in self.available}
        return replace(self, available=kept, missing={**self.missing, **off})

    def refusal(self) -> str | None:
        """Why nothing may run with these, unless it is asked for as unsafe."""
        have = set(self.available)
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
        """One line a layer."""
        lines = [f"{name}: on" for name in self.available]
        return "\n".join(lines + [f"{name}: off ({why})" for name, why in self.missing.items()])


def ask(job: Mapping[str, Any], seconds: float) -> Any:
    """Starts a supervisor and gives it a job.

    Raises:
        SandboxError: no answer in that time, or none that can be read.
    """
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
    """Tries each layer in a process of its own. Once: the answer is kept."""
    with tempfile.TemporaryDirectory(prefix="kvjax-probe-") as scratch:
        found = ask({"probe": scratch}, 60)
    return Layers(
        available=tuple(name for name, why in found.items() if not why),
        missing={name: why for name, why in found.items() if why},
    )
