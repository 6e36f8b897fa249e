"""How the processes of a run find each other."""

from __future__ import annotations

import atexit
import os
import sys
import threading

import jax

from kvjax import flags
from kvjax.processes.peers import Peers, limited
from kvjax.processes.relay import Relay
from kvjax.processes.sockets import CONNECT, check_free, is_loopback
from kvjax.processes.work import client

VARIABLE = "KVJAX_DISTRIBUTED"
FORM = "auto or HOST:PORT,PROCESSES,INDEX"


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --distributed, and the arguments without it.

    Raises:
        ValueError: the flag without a value.
    """
    return flags.take(argv, "--distributed", FORM)


def asked(text: str | None) -> bool:
    """Whether `join` with this text makes the process one of several."""
    return bool(text or os.environ.get(VARIABLE))


def parse(text: str) -> tuple[str, int, int]:
    """(HOST:PORT of process 0, processes, index of this one) from HOST:PORT,PROCESSES,INDEX.

    Raises:
        ValueError: text of another form, or an index that is not below the number of processes.
    """
    address, *numbers = text.split(",")
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and len(numbers) == 2 and all(n.isdigit() for n in numbers)):
        raise ValueError(f"got --distributed or {VARIABLE} {text!r}, expected {FORM}")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"got process {index} of {count} in {text!r}, expected 0 to {count - 1}")
    return address, count, index


def join(text: str | None = None, timeout: float = 300.0) -> None:
    """Becomes one process of several; nothing happens without a text.

    Args:
        text: "auto" on TPU pods, under Slurm and Open MPI, or HOST:PORT,PROCESSES,INDEX, where
            HOST:PORT is a free port of the first process's host that the others reach; None or
            empty: the environment variable KVJAX_DISTRIBUTED.
        timeout: seconds to wait for the others; then the process ends.

    Raises:
        ValueError: text of another form, no such environment for "auto", or a port that process 0
            cannot have.
    """
    text = text or os.environ.get(VARIABLE, "")
    if not text:
        return
    # With it, SIGTERM would not end a process: it waits for a program that asks.
    jax.config.update("jax_enable_preemption_service", False)
    found = _detect() if text == "auto" else parse(text)
    if found is None:  # a jax whose detection is another's
        jax.distributed.initialize()
        return
    (address, count, index), leaving = found, threading.Event()
    host, _, port = address.rpartition(":")
    relay = Relay(leaving)
    target, bind = address, address if is_loopback(host) else None
    if index == 0:
        check_free(host, int(port))
    else:
        target = f"127.0.0.1:{relay.start(host, int(port))}"
    late = f"process {index} waited {timeout:g} s for all {count} at {address}"
    with limited(timeout, late):  # jax would abort with a C++ stack
        jax.distributed.initialize(
            target,
            count,
            index,
            coordinator_bind_address=bind,
            initialization_timeout=round(timeout) + 60,
        )
    if count > 1:
        relay.joined()
        _watch(Peers(leaving), host, index)
        # Runs before jax's own, which lets go of the others.
        atexit.register(leaving.set)


def _detect() -> tuple[str, int, int] | None:
    """What jax knows of the cluster it runs in; None if it cannot be asked."""
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, _ = detect(None, None, None, None, None, 300)
    except (ImportError, AttributeError, TypeError):
        return None
    if address is None or count is None or index is None:
        raise ValueError(
            "got --distributed auto, expected a TPU pod, Slurm or Open MPI; elsewhere give "
            "HOST:PORT,PROCESSES,INDEX"
        )
    return address, count, index


def _watch(peers: Peers, host: str, index: int) -> None:
    if index == 0:
        port, word = peers.serve(host)
        client().key_value_set("kvjax/peers", f"{port} {word}")
        return
    port, word = client().blocking_key_value_get("kvjax/peers", round(CONNECT * 1000)).split()
    try:
        peers.connect(host, int(port), word, index)
    except OSError as error:
        print(
            f"cannot watch process 0 at {host}:{port} ({error}): a process that is gone will be "
            "noticed after 100 seconds",
            file=sys.stderr,
        )
