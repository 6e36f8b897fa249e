"""Several processes as one run: how they find each other, who writes, and how they end.

A process joins with `join`, before anything else of jax is used. Then `jax.devices()` are the
devices of all of them. All run the same program; what only one may write, process 0 writes.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jax

from kvjax.peers import CONNECT, Peers, check_free, is_loopback, limited

VARIABLE = "KVJAX_DISTRIBUTED"
FORM = "auto or HOST:PORT,PROCESSES,INDEX"
DAY = 24 * 3600.0
T = TypeVar("T")
_numbers = itertools.count()


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --distributed, and the arguments without it.

    Raises:
        ValueError: the flag without a value.
    """
    rest = [word for word in argv if not word.startswith("--distributed=")]
    found = [w.partition("=")[2] for w in argv if w.startswith("--distributed=")]
    while "--distributed" in rest:
        at = rest.index("--distributed")
        if at + 1 == len(rest):
            raise ValueError(f"got --distributed without a value, expected {FORM}")
        found.append(rest[at + 1])
        del rest[at : at + 2]
    return (found[-1] if found else None), rest


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
    found = _detect() if text == "auto" else parse(text)
    if found is None:  # a jax whose detection is another's
        jax.distributed.initialize()
        return
    (address, count, index), peers = found, Peers()
    host, _, port = address.rpartition(":")
    target, bind = address, address if is_loopback(host) else None
    if index == 0:
        check_free(host, int(port))
    else:
        target = f"127.0.0.1:{peers.relay(host, int(port))}"
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
        peers.joined()
        _watch(peers, host, index)
        # Runs before jax's own, which lets go of the others.
        atexit.register(peers.leave)


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes what only one may write."""
    return not several() or jax.process_index() == 0


def barrier(name: str, timeout: float = DAY) -> None:
    """Waits until all processes are here.

    Args:
        name: for the error; all processes come to the same barriers in the same order.
        timeout: in seconds.

    Raises:
        ValueError: some did not come in time.
    """
    if not several():
        return
    try:
        _client().wait_at_barrier(f"kvjax/{next(_numbers)}/{name}", round(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise ValueError(
            f"process {jax.process_index()} waited {timeout:g} s at {name!r}, expected all "
            f"{jax.process_count()} processes there"
        ) from None


def on_writer(call: Callable[[], Any]) -> Any:
    """What `call` returns on the writer, on all processes, which wait for it; JSON.

    Raises:
        ValueError: what the writer's call raised.
    """
    if not several():
        return call()
    key = f"kvjax/{next(_numbers)}"
    if not is_writer():
        error, value = json.loads(_client().blocking_key_value_get(key, round(DAY * 1000)))
        if error is not None:
            raise ValueError(error)
        return value
    try:
        value = call()
    except ValueError as error:
        _client().key_value_set(key, json.dumps([str(error), None]))
        raise
    _client().key_value_set(key, json.dumps([None, value]))
    return value


def share(parts: Sequence[T]) -> Sequence[T]:
    """Those of the parts of some work that this process does: every n-th of n processes."""
    return parts[jax.process_index() :: jax.process_count()] if several() else parts


@contextmanager
def together() -> Iterator[None]:
    """Around a whole command: it ends when it has ended on all processes.

    What is no user's error ends this process at once, with a traceback; if another process is
    gone, which breaks collectives, there is a line about that instead. Users' errors pass; `stop`
    then.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ModuleNotFoundError, OSError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, Exception):
            time.sleep(10)  # for the thread that watches the others
        traceback.print_exc()
        stop(1)
    barrier("the end")


def stop(code: int) -> NoReturn:
    """Ends this process; one of several at once, without waiting for others, which notice."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
        _client().key_value_set("kvjax/peers", f"{port} {word}")
        return
    port, word = _client().blocking_key_value_get("kvjax/peers", round(CONNECT * 1000)).split()
    try:
        peers.connect(host, int(port), word, index)
    except OSError as error:
        print(
            f"cannot watch process 0 at {host}:{port} ({error}): a process that is gone will be "
            "noticed after 100 seconds",
            file=sys.stderr,
        )


def _client() -> Any:
    from jax._src import distributed  # jax has no public way to its key-value store

    return distributed.global_state.client
