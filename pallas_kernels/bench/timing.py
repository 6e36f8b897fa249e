"""Times of compiled functions, which take turns so that whatever else runs meets all of them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SHORTEST = 0.02
"""Seconds that a measurement lasts at least: short calls are made several times."""


def in_turns(
    functions: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a call of each function, `repeats` times, after calls that compile."""
    calls = {name: _calls_needed(run) for name, run in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, run in functions.items():
            jax.block_until_ready(run())  # what the one before left, in caches and buffers, is gone
            start = clock()
            for _ in range(calls[name] - 1):
                run()
            jax.block_until_ready(run())
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def _calls_needed(run: Callable[[], Any]) -> int:
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    return max(1, int(SHORTEST / max(time.perf_counter() - start, 1e-6)))


def copier(bytes_: int) -> tuple[Callable[[], jax.Array], int]:
    """A copy on the device, and the bytes that it moves: those it reads and those it writes."""
    source = jnp.zeros((bytes_ // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    return (lambda: copy(source)), 2 * source.nbytes
