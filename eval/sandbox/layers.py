"""Which layers this machine has, tried out once."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
