"""Commands as several processes with two devices each, on this machine over loopback."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-m", "without_torch")
"""Runs a module as `python -m` does; see without_torch.py."""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**changes):
    """The environment of a process that finds the project and the modules of the tests."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **changes}


@contextlib.contextmanager
def started(words, out, count=2, variable=False):
    """Processes of the module WORDS[0]; what they say is in out/said.INDEX, and none stays.

    Args:
        variable: tell them by KVJAX_DISTRIBUTED, not by the flag.
    """
    flags = re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"])
    address, running = f"127.0.0.1:{free_port()}", []
    out.mkdir(parents=True, exist_ok=True)
    try:
        for index in range(count):
            text = f"{address},{count},{index}"
            told = [] if variable else ["--distributed", text]
            with (out / f"said.{index}").open("w") as said:
                running.append(
                    subprocess.Popen(
                        [*COMMAND, *map(str, words), *told],
                        cwd=ROOT,
                        env=environment(
                            XLA_FLAGS=flags, KVJAX_DISTRIBUTED=text if variable else ""
                        ),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=said,
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def lines(out, index):
    """What a process said on standard error, without what transformers says of a missing torch."""
    said = (out / f"said.{index}").read_text().splitlines()
    return [line for line in said if not line.startswith("[transformers]")]


def run(words, out, count=2, variable=False):
    """All of them to their end, which is a good one."""
    with started(words, out, count, variable) as processes:
        codes = [process.wait(240) for process in processes]
    assert codes == [0] * count, [lines(out, index)[-20:] for index in range(count)]
