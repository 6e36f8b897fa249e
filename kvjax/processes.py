"""Several processes as one run: how they find each other, share work, and end.

Every process calls `join` before anything else of jax. Then `jax.devices()` are the devices of all
processes. All processes run the same program, and process 0 alone writes files that exist once.
jax watches the processes: when one stops sending heartbeats, jax aborts the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kvjax import paths

VARIABLE = "KVJAX_DISTRIBUTED"
FORM = "auto or HOST:PORT,PROCESSES,INDEX"
GONE = 75
"""Exit code of a process that jax aborts: "try again" (EX_TEMPFAIL)."""
HEARTBEAT = 30
"""Seconds without a heartbeat after which jax gives a process up."""
GRACE = 1.0
"""Seconds that an aborted process gets to end on an error in its own code."""
DAY = 24 * 3600.0

T = TypeVar("T")
_numbers = itertools.count()  # all processes reach the same barriers in the same order


# --- Start ---------------------------------------------------------------------------------------


def take_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --distributed, and the arguments without the flag.

    Raises:
        ValueError: the flag has no value.
    """
    return paths.take_flag(argv, "--distributed", FORM)


def asked(text: str | None) -> bool:
    """Whether `join` with this text makes the process one of several."""
    return bool(text or os.environ.get(VARIABLE))


def parse(text: str) -> tuple[str, int, int]:
    """(HOST:PORT of process 0, number of processes, index) from HOST:PORT,PROCESSES,INDEX.

    Raises:
        ValueError: the text has another form, or the index is not below the number of processes.
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
    """Makes this process one of several. Without a text, the call does nothing.

    Args:
        text: "auto" on TPU pods, under Slurm and under Open MPI, or HOST:PORT,PROCESSES,INDEX.
            HOST:PORT is a free port on the host of process 0 that the other hosts reach. None or
            "": the environment variable KVJAX_DISTRIBUTED.
        timeout: seconds to wait for the other processes, a whole number. Afterwards the process
            ends with one line and exit code `GONE`.

    Raises:
        ValueError: the text has another form, "auto" finds no cluster, or the port is taken.
    """
    text = text or os.environ.get(VARIABLE, "")
    if not text:
        return
    where: dict[str, Any] = {}
    late = f"waited {timeout:g} s for the other processes"
    if text != "auto":
        address, count, index = parse(text)
        host, _, port = address.rpartition(":")
        loopback = host in ("localhost", "[::1]") or host.startswith("127.")
        if index == 0:
            _check_free("127.0.0.1" if loopback else "", int(port))
        where = {"coordinator_address": address, "num_processes": count, "process_id": index}
        # Without a bind address, jax listens on all of the machine's network interfaces.
        where["coordinator_bind_address"] = address if loopback else None
        late = f"process {index} waited {timeout:g} s for all {count} at {address}"
    # SIGTERM ends one of several processes at once. jax's preemption service would prevent that. So
    # would a handler of Python's: it waits for the end of a collective, which may never come.
    jax.config.update("jax_enable_preemption_service", False)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _at_abort(late)
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:
        if text != "auto":
            raise
        raise ValueError(
            f"got --distributed {text}, expected a TPU pod, Slurm or Open MPI ({error}); elsewhere "
            "give HOST:PORT,PROCESSES,INDEX"
        ) from None
    _at_abort(
        "this process stops, most likely because another process of the run is gone (killed, out "
        "of memory, an error in that process, or its host is down); start all processes again with "
        "the same command, and the run continues where it was"
    )


def _check_free(host: str, port: int) -> None:
    """Raises ValueError if process 0 cannot have the port: jax 0.12 crashes without an error."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot have port {port} ({error.strerror}), expected a free one"
        ) from None


# --- Sharing work --------------------------------------------------------------------------------


def several() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes the files that exist once: process 0 does."""
    return not several() or jax.process_index() == 0


def share(parts: Sequence[T]) -> Sequence[T]:
    """The parts of some work that this process does: every n-th part, with n processes."""
    return parts[jax.process_index() :: jax.process_count()] if several() else parts


def barrier(name: str, timeout: float = DAY) -> None:
    """Waits until all processes have called `barrier` with this name.

    Args:
        name: appears in the error. All processes come to the same barriers in the same order.
        timeout: in seconds.

    Raises:
        ValueError: some processes did not come in time.
    """
    if not several():
        return
    from orbax.checkpoint import multihost  # jax offers no barrier with a timeout

    wait = multihost.get_barrier_sync_fn()
    try:
        wait(key=f"kvjax/{next(_numbers)}/{name}", timeout_ms=round(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise ValueError(
            f"process {jax.process_index()} waited {timeout:g} s at {name!r}, expected all "
            f"{jax.process_count()} processes there"
        ) from None


def on_writer(call: Callable[[], Any]) -> Any:
    """Calls a function on the writer alone, and returns its result on all processes.

    Args:
        call: returns a value that JSON can express. The other processes wait for the value.

    Raises:
        ValueError: the writer's call raised a ValueError with this message.
    """
    if not several():
        return call()
    error: ValueError | None = None
    value = None
    if is_writer():
        try:
            value = call()
        except ValueError as raised:
            error = raised
    # The call may take hours. The barrier waits for that long, collectives do not everywhere.
    barrier("the writer's call")
    message, value = json.loads(
        _broadcast(json.dumps([None if error is None else str(error), value]))
    )
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)
    return value


def _broadcast(text: str) -> str:
    """The text of process 0, on all processes."""
    data = text.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, so that few programs compile
    if is_writer():
        padded[:size] = np.frombuffer(data, np.uint8)
    return multihost_utils.broadcast_one_to_all(padded)[:size].tobytes().decode()


# --- The end -------------------------------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Surrounds a whole command, which then ends on all processes at the same time.

    Users' errors pass; the caller prints them and calls `stop`. Any other error of one of several
    processes ends that process with a traceback, unless the error comes from a lost process: then
    jax aborts this process, which says so in one line.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ModuleNotFoundError, OSError):
        raise
    except Exception as error:
        if not several():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A lost process breaks collectives at once; the heartbeats report it later.
            time.sleep(HEARTBEAT + 10)
        traceback.print_exc()
        stop(1)
    barrier("the end")


def stop(code: int) -> NoReturn:
    """Ends this process with an exit code; one of several does not wait for the others."""
    if not several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        # jax's service ends with process 0. Give the others time to report the same user's error.
        time.sleep(2 * GRACE)
    os._exit(code)


_AbortHandler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_abort_handlers: list[Any] = []  # C keeps pointers to them


def _at_abort(line: str) -> None:
    """Lets this process end with a line and exit code `GONE` where jax would abort it.

    jax calls C's abort() from a thread when another process is lost. Python runs its own signal
    handlers in the main thread only, which may hang in a collective, so this one is C's.
    """

    def handle(_: int) -> None:
        time.sleep(GRACE)
        os.write(2, f"error: {line}\n".encode())
        os._exit(GONE)

    _abort_handlers.append(_AbortHandler(handle))
    install = ctypes.CDLL(None).signal
    install.argtypes = [ctypes.c_int, ctypes.c_void_p]
    install.restype = ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(_abort_handlers[-1], ctypes.c_void_p))
