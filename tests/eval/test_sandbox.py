"""What programs try, and what is left of it. Limits are small, so that a hole costs little."""

import ctypes
import errno
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.sandbox import filters, linux, runner
from eval.sandbox.confine import LAYERS, Limits, others_reach
from eval.sandbox.runner import ROOT, Layers, SandboxError, ask, probe, run, run_many

if sys.platform != "linux":
    pytest.skip("the layers are Linux's", allow_module_level=True)

SMALL = {"timeout": 20.0, "memory_bytes": 128 << 20, "processes": 8}
BRIEF = {**SMALL, "timeout": 1.0}
"""For what only the clock ends; a busy machine needs longer for anything else."""
BOMBS = {
    "fork": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "new sessions": (
        "import os\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n"
        "    except OSError: pass\n"
    ),
}
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(100)
    os._exit(0)
os.wait()
"""
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n"


@pytest.fixture
def nothing_left():
    """Fails if the test leaves a process: orphans of the sandbox would become our children."""
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    before = linux.descendants(os.getpid())
    yield
    left = linux.descendants(os.getpid()) - before
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def needs(*names: str) -> Layers:
    """All layers; skips where one of these is missing."""
    layers = probe()
    for name in names:
        if name in layers.missing:
            pytest.skip(f"no {name}: {layers.missing[name]}")
    return layers


def only(*names: str) -> Layers:
    """These and what they cannot do without."""
    layers = needs(*names)
    kept = {*names, "no_new_privs", "user_namespace", "rlimits"}
    return layers.without(*(set(layers.available) - kept))


@functools.cache
def counted() -> Layers:
    """Layers under which processes are counted per sandbox; without, no bomb is run."""
    layers = needs("rlimits")
    if not {"dropped_root", "user_namespace"} & set(layers.available):
        pytest.skip("no uid of its own: the limit of processes cannot be relied on")
    probed = run(
        "import os, time\nfor _ in range(20):\n    if os.fork() == 0: time.sleep(1); os._exit(0)",
        layers=layers.without("seccomp"),
        unsafe=True,
        **SMALL,
    )
    assert "BlockingIOError" in probed.reason, "the limit of processes does not hold"
    return layers


def test_every_layer_is_on_or_says_why_not():
    layers = probe()
    assert sorted((*layers.available, *layers.missing)) == sorted(LAYERS)
    assert all(layers.missing.values())
    assert len(layers.describe().splitlines()) == len(LAYERS)
    with pytest.raises(ValueError, match="no such layer: chroot"):
        layers.without("chroot")


ENDS = {
    "assert 1 + 1 == 2": "passed",
    "assert False, 'no'": "AssertionError: no",
    "x =": "SyntaxError: invalid syntax (<program>, line 1)",
    "import sys; sys.exit(0)": "SystemExit: 0",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os; os._exit(0)": "ended before its tests did, with status 0",
    "import os; os.abort()": "killed by SIGABRT",
    "import os; os.write(4, b'{\"passed\": true}'); os._exit(0)": "the answer wrote",
    "class E(Exception):\n    def __str__(self): 1 / 0\nraise E": "E",
    "import sys; sys.stdout.close()": "passed",
    "import threading as t; a = t.Thread(target=print); a.start(); a.join()": "passed",
    "import math, random, json, re, hashlib, decimal, numpy": "passed",
    "assert __name__ == '__main__'": "passed",
    "import sys; assert sys.stdin.read() == ''": "passed",
    "\udc80": "UnicodeEncodeError",
}
"""Answers without a test → how they end."""


def test_what_passes(nothing_left):
    for (program, reason), outcome in zip(ENDS.items(), run_many(list(ENDS)), strict=True):
        assert outcome.reason.startswith(reason), program
        assert outcome.passed == (reason == "passed"), program


def test_several_at_a_time_in_order(nothing_left):
    programs = [f"print({i}); assert {i} % 2" for i in range(40)]
    outcomes = run_many(programs, workers=2)
    assert [o.passed for o in outcomes] == [False, True] * 20
    assert [o.stdout for o in outcomes] == [f"{i}\n" for i in range(40)]


LIMITS = {
    "while True: pass": "timed out after 1 s",
    "import time; time.sleep(100)": "timed out after 1 s",
    "while True: print('x' * 1000)": "wrote more than 65536 bytes",
    "x = bytearray(1 << 30)": "MemoryError",
    "x = []\nwhile True: x.append(bytearray(1 << 22))": "MemoryError",
    "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))": "OSError: [Errno 27]",
    "f = [open('/dev/null') for _ in range(100)]": "OSError: [Errno 24]",
    "def f(): f()\nf()": "RecursionError",
    "import signal, os; os.kill(os.getpid(), signal.SIGSTOP)": "timed out",
}
"""Answers that exceed a limit → how they end."""


def test_limits(nothing_left):
    # Those that only the clock ends get less time.
    for late, limits in ((True, BRIEF), (False, SMALL)):
        programs = [p for p, reason in LIMITS.items() if reason.startswith("timed out") == late]
        for program, outcome in zip(
            programs, run_many(programs, None, Limits(**limits)), strict=True
        ):
            assert outcome.reason.startswith(LIMITS[program]), program
            assert not outcome.passed
            assert len(outcome.stdout) <= 1 << 16


def test_all_files_together_have_a_limit(nothing_left):
    needs("mount_namespace")
    outcome = run("for i in range(40): open(str(i), 'wb').write(bytes(1 << 20))", **SMALL)
    assert outcome.reason.startswith("OSError: [Errno 28]")


@pytest.mark.parametrize(
    "off", [(), ("seccomp",), ("pid_namespace",), ("seccomp", "pid_namespace")]
)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb, off, nothing_left):
    layers = counted().without(*off)
    outcome = run(BOMBS[bomb], layers=layers, unsafe=True, **BRIEF)
    assert not outcome.passed
    assert outcome.reason == "timed out after 1 s"


@pytest.mark.parametrize("off", [("seccomp",), ("seccomp", "pid_namespace")])
def test_a_daemon_ends_with_its_program(off, nothing_left):
    outcome = run(DAEMON, layers=counted().without(*off), unsafe=True, **SMALL)
    assert outcome.passed


def test_seccomp_allows_no_processes(nothing_left):
    layers = only("seccomp")
    for start in ("os.fork()", "os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 9)"):
        outcome = run(f"import os; {start}", layers=layers, unsafe=True, **SMALL)
        assert outcome.reason.startswith("PermissionError: [Errno 1]")


@pytest.mark.parametrize("layer", ["mount_namespace", "landlock", "all", None])
def test_files_outside(layer, tmp_path, nothing_left):
    """Each layer keeps a file alone; it goes without any, so that the test means something."""
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("x")
    remove = f"import os; os.remove({str(kept)!r})"
    layers = probe() if layer == "all" else only(*([layer] if layer else []))
    outcome = run(remove, layers=layers, unsafe=True, **SMALL)
    assert kept.exists() != outcome.passed
    assert outcome.passed == (layer is None)
    if layer is None:
        return
    for change in (f"open({str(kept)!r}, 'w')", f"open({str(new)!r}, 'w')"):
        assert not run(change, layers=layers, unsafe=True, **SMALL).passed
    assert kept.read_text() == "x" and not new.exists()
    inside = "open('a', 'w').write('x'); import os; os.rename('a', 'b'); os.remove('b')"
    assert run(inside, layers=layers, unsafe=True, **SMALL).passed == (layer != "landlock")


def test_landlock_allows_no_reading_elsewhere(tmp_path, nothing_left):
    needs("landlock")
    (tmp_path / "secret").write_text("x")
    tmp_path.chmod(0o755)
    layers = probe().without("mount_namespace")
    outcome = run(f"open({str(tmp_path / 'secret')!r})", layers=layers, **SMALL)
    assert outcome.reason.startswith("PermissionError")


@pytest.mark.parametrize("layer", ["network_namespace", "seccomp", "all", None])
def test_sockets(layer, nothing_left):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CONNECT.format(port=server.getsockname()[1])
        layers = probe() if layer == "all" else only(*([layer] if layer else []))
        outcome = run(program, layers=layers, unsafe=True, **SMALL)
    assert outcome.passed == (layer is None)


def test_nothing_of_our_environment(monkeypatch, nothing_left):
    monkeypatch.setenv("HF_TOKEN", "secret")
    outcome = run("import os; print(sorted(os.environ))", **SMALL)
    assert outcome.passed and "HF_TOKEN" not in outcome.stdout


@pytest.mark.parametrize(
    ("off", "lacking"),
    [
        (("network_namespace", "seccomp"), "off the network"),
        (("mount_namespace", "landlock"), "from files"),
        (("mount_namespace", "seccomp"), "from files"),
        (("pid_namespace", "seccomp"), "from other processes"),
    ],
)
def test_refusal(off, lacking, nothing_left):
    layers = probe().without(*off)
    with pytest.raises(ValueError, match=lacking):
        run("pass", layers=layers)
    assert run("pass", layers=layers, unsafe=True).passed


def test_a_sandbox_that_fails_is_no_failed_program(nothing_left):
    layers = needs("landlock", "seccomp", "no_new_privs").without("no_new_privs")
    with pytest.raises(SandboxError, match="Operation not permitted"):
        run("pass", layers=layers, **SMALL)
    found, error = ask({}, [], 60)
    assert not found and error.startswith("the supervisor ended with 1: Traceback")


def test_a_killed_supervisor_costs_one_program(monkeypatch, nothing_left):
    passed = {"passed": True, "reason": "passed", "stdout": "first"}
    killed = [{"started": True}, passed, {"started": True}], "the supervisor ended with -9"
    answers = iter([lambda *job: killed, ask])
    monkeypatch.setattr(runner, "ask", lambda *job: next(answers)(*job))
    outcomes = run_many(["pass", "pass", "print(3)"], 1)
    assert [o.reason for o in outcomes] == ["passed", runner.LOST, "passed"]
    assert outcomes[2].stdout == "3\n"


def test_nothing_outlives_the_evaluation(nothing_left, tmp_path):
    """The evaluating process is killed in the middle of a program."""
    code = "from eval.sandbox.runner import run; run('print(1)\\nwhile True: pass', timeout=60)"
    before = linux.descendants(os.getpid())
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its folder is left behind
    host = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 60
    while len(linux.descendants(host.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(linux.descendants(host.pid)) >= 3  # supervisor, its child, worker
    host.kill()
    host.wait()
    while (left := linux.descendants(os.getpid()) - before) and time.monotonic() < deadline:
        reap(left)
        time.sleep(0.05)
    reap(linux.descendants(os.getpid()))


def reap(pids):
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue


UNPRIVILEGED = """
import os, sys
os.setgroups([]); os.setgid(65533); os.setuid(65533)
sys.path.insert(0, sys.argv[1])
from eval.sandbox.runner import probe
from eval.sandbox.runner import run
layers = probe()
if "user_namespace" in layers.missing:
    print("no user namespace:", layers.missing["user_namespace"])
    sys.exit(5)
fork = "import os, time\\nfor _ in range(20):\\n    if os.fork() == 0: time.sleep(1); os._exit(0)"
assert run("pass").passed
assert "Errno 1]" in run("import os; os.fork()").reason
limited = run(fork, processes=8, layers=layers.without("seccomp"))
assert "BlockingIOError" in limited.reason, limited
assert not run(f"import os; os.remove({sys.argv[2]!r})").passed
os.remove(sys.argv[2])
"""


def test_without_root(nothing_left):
    """User namespaces, from root: another user with an interpreter that it can read."""
    python = Path("/usr/bin/python3")
    if os.geteuid():
        pytest.skip("not root: the other tests are this one")
    if not python.exists() or not others_reach(str(ROOT)):
        pytest.skip("no interpreter or checkout that other users can read")
    new = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"])
    if new.returncode:
        pytest.skip("the system's interpreter is older than 3.11")
    own = Path(f"/tmp/kvjax-test-{os.getpid()}")
    own.write_text("x")
    os.chown(own, 65533, 65533)
    try:
        command = [python, "-B", "-c", UNPRIVILEGED, str(ROOT), str(own)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        if done.returncode == 5:
            pytest.skip(done.stdout)
        assert done.returncode == 0, done.stderr
        assert not own.exists()
    finally:
        own.unlink(missing_ok=True)


def decide(code, architecture, number, argument=0):
    """Runs a filter as the kernel does."""
    words = {0: number, 4: architecture, 16: argument}
    loaded, at = 0, 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == filters.LOAD:
            loaded = words[k]
        elif operation == filters.RETURN:
            return k
        else:
            holds = {
                filters.EQUAL: loaded == k,
                filters.AT_LEAST: loaded >= k,
                filters.ANY_BIT: bool(loaded & k),
            }[operation]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", filters.ARCHITECTURES)
def test_filter(machine):
    """Also for the machine that this one is not."""
    column, architecture = filters.ARCHITECTURES[machine]
    code = filters.seccomp_program(column, architecture, pid=7)
    refused = filters.REFUSE | errno.EPERM

    def answer(number, argument=0):
        return decide(code, architecture, number, argument)

    for numbers in filters.DENIED.values():
        assert numbers[column] is None or answer(numbers[column]) == refused
    assert answer(filters.CLONE[column], linux.CLONE_THREAD | 0x11) == filters.ALLOW
    assert answer(filters.CLONE[column], signal.SIGCHLD) == refused
    assert answer(filters.CLONE3[column]) == filters.REFUSE | errno.ENOSYS
    assert answer(filters.KILL[column], 7) == filters.ALLOW
    assert answer(filters.KILL[column], ctypes.c_uint(-1).value) == refused
    assert answer(filters.PRLIMIT[column], 0) == filters.ALLOW
    assert answer(filters.PRLIMIT[column], 8) == refused
    assert answer(filters.PRCTL[column], linux.PR_SET_PDEATHSIG) == refused
    assert answer(filters.PRCTL[column], linux.PR_SET_DUMPABLE) == filters.ALLOW
    assert answer({"x86_64": 1, "aarch64": 64}[machine]) == filters.ALLOW  # write
    assert answer(filters.X32 + 1) == refused
    assert decide(code, architecture ^ 1, 1) == filters.KILL_PROCESS
