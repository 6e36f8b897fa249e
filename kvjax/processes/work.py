"""What the processes of a run do together, and what one does alone."""

from __future__ import annotations

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

DAY = 24 * 3600.0
T = TypeVar("T")
_numbers = itertools.count()


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
        client().wait_at_barrier(f"kvjax/{next(_numbers)}/{name}", round(timeout * 1000))
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
        error, value = json.loads(client().blocking_key_value_get(key, round(DAY * 1000)))
        if error is not None:
            raise ValueError(error)
        return value
    try:
        value = call()
    except ValueError as error:
        client().key_value_set(key, json.dumps([str(error), None]))
        raise
    client().key_value_set(key, json.dumps([None, value]))
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


def client() -> Any:
    """Of jax's coordination service."""
    from jax._src import distributed  # jax has no public way to its key-value store

    return distributed.global_state.client
