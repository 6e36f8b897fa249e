"""Commands as processes of their own: one, or several that run together over loopback."""

import contextlib
import os
import re
import socket

from benchmarks.disturbed import start


def ended(process, seconds):
    """The exit code of a process that ends within some seconds; minus a signal's number."""
    process.join(seconds)
    return process.exitcode


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(words, out, count=2, variable=False):
    """Processes with two devices each; what they say is in out/said.INDEX, and none stays.

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
            environment = {"XLA_FLAGS": flags, "KVJAX_DISTRIBUTED": text if variable else ""}
            running.append(start([*words, *told], out / f"said.{index}", **environment))
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def lines(out, index):
    """What a process said on standard error, without what transformers says of a missing torch."""
    said = (out / f"said.{index}").read_text().splitlines()
    return [line for line in said if not line.startswith("[transformers]")]


def run(words, out, count=2, variable=False):
    """All of them to their end, which is a good one."""
    with started(words, out, count, variable) as processes:
        codes = [ended(process, 240) for process in processes]
    assert codes == [0] * count, [lines(out, index)[-20:] for index in range(count)]
