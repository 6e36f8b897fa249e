"""Runs the hostile programs and looks for what they must not have done.

`python tests/hostile.py benchmarks/results/hostile_programs.json` tries all of them as root and as
another user: with all layers, without Landlock, without a mount namespace, and with no namespaces.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from hostile_programs import ALARM, KEY, SECRET, SLOW, TEST, programs  # noqa: E402

from eval.sandbox import linux  # noqa: E402
from eval.sandbox.confine import Limits  # noqa: E402
from eval.sandbox.judge import Program  # noqa: E402
from eval.sandbox.runner import Layers, probe, run_many  # noqa: E402

LIMITS = Limits(timeout=20.0, memory_bytes=256 << 20, processes=8)
HONEST = Program("def solve(n): return n + 1", "assert solve(1) == 2", "", ("solve",))
SHARED = Path("/dev/shm/kvjax-hostile")
NAMESPACES = ("user_namespace", "network_namespace", "pid_namespace", "mount_namespace")
WITHOUT = ((), ("landlock",), ("mount_namespace",), NAMESPACES)
"""The layers that are switched off, one set after the other."""


def trial(layers: Layers, chosen=lambda kind, name: True, seconds: float = 1.0) -> list[str]:
    """Runs programs, and an honest one after them. Returns what went wrong, a line for each fault.

    Args:
        chosen: (kind, name) → whether to run this program.
        seconds: of those that run until their time is up.
    """
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        # Every user may read the secret and write beside it: only the sandbox prevents that.
        os.chmod(folder, 0o777)
        secret, mark = Path(folder, "secret"), Path(folder, "mark")
        secret.write_text(SECRET)
        before = _prepare(Path(folder, "runs"))
        wanted = {k: v for k, v in programs(str(secret), str(mark)).items() if chosen(*k)}
        for slow in (False, True):
            names = [key for key in wanted if (key in SLOW) == slow]
            tests = [Program(wanted[key], TEST, "", ("solve",)) for key in names]
            limits = LIMITS._replace(timeout=seconds) if slow else LIMITS
            outcomes = run_many(tests, 2, limits, layers=layers)
            for key, outcome in zip(names, outcomes, strict=True):
                said = outcome.stdout + outcome.reason
                seen = [what for what in (KEY, SECRET, ALARM) if what in said]
                faults += [f"{key}: passed"] * outcome.passed + [f"{key}: {w}" for w in seen]
        if not run_many([HONEST], 1, LIMITS, layers=layers)[0].passed:
            faults.append("the honest program failed")
        faults += [f"{path} is left" for path in (mark, SHARED) if path.exists()]
        faults += _left(Path(folder, "runs"), before)
    return faults


def _prepare(runs: Path) -> set[int]:
    """Puts the runs' folders into `runs`, and orphans below this process. Returns who is there."""
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    runs.mkdir(mode=0o711)
    tempfile.tempdir = str(runs)
    os.environ["HF_TOKEN"] = SECRET
    return linux.descendants(os.getpid())


def _left(runs: Path, before: set[int]) -> list[str]:
    tempfile.tempdir = None
    del os.environ["HF_TOKEN"]
    left = linux.descendants(os.getpid()) - before
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"process {pid} is left" for pid in left] + [f"{p} is left" for p in runs.iterdir()]


def matrix() -> list[dict]:
    """A trial of all programs with each set of layers, as this user."""
    rows = []
    for off in WITHOUT:
        start, layers = time.monotonic(), probe().without(*off)
        refused = layers.refusal()
        faults = [] if refused else trial(layers)
        rows.append(
            {
                "user": "root" if not os.geteuid() else "another user",
                "layers": list(layers.available),
                "refused": refused,
                "programs": 0 if refused else len(programs("", "")),
                "faults": faults,
                "seconds": round(time.monotonic() - start, 1),
            }
        )
    without = probe().without("landlock", "mount_namespace")
    return [*rows, {"layers": list(without.available), "refused": without.refusal()}]


ANOTHER = """
import json, os, sys
os.setgroups([]); os.setgid(65533); os.setuid(65533)
sys.path.insert(0, sys.argv[1])
import hostile
print(json.dumps(hostile.matrix()))
"""


def matrix_of_another(python: str) -> list[dict]:
    """`matrix` as another user than root, with an interpreter that this user can read."""
    command = [python, "-B", "-c", ANOTHER, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    from benchmarks.environment import environment

    found = {"environment": environment("tests.hostile"), "trials": matrix()}
    if not os.geteuid():
        found["trials"] += matrix_of_another("/usr/bin/python3")
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["trials"], indent=1))
