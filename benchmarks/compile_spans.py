"""What jax spends before a program runs: tracing, lowering, compiling, or reading a compiled one.

jax announces the beginning and the end of each of these. `watched` turns the announcements into
spans with the processor time that passed in between.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax import monitoring

STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
"""jax's event → our name of the stage."""

FROM_CACHE = "/jax/compilation_cache/cache_hits"
"""jax's event for a compiled program that came from the persistent cache; it has no name."""


@dataclass
class Span:
    """One stage of one program.

    Attributes:
        stage: "trace", "lower", "compile", or "read" where the persistent cache had the program.
        name: of the function, as jax reports it.
        cpu_s: processor seconds of the whole process, without those of `inner`.
        inner: processor seconds of the spans inside: a trace contains those of inner jits.
    """

    stage: str
    name: str
    cpu_s: float = 0.0
    inner: float = 0.0


@contextlib.contextmanager
def watched() -> Iterator[list[Span]]:
    """Collects the spans that end while the context is open, in the order in which they end."""
    done: list[Span] = []
    # Stages nest within a thread, and threads compile side by side.
    unfinished: dict[int, list[Span]] = defaultdict(list)

    def begins(event: str, value: float, **facts: Any) -> None:
        if event in STAGES:
            span = Span(STAGES[event], str(facts.get("fun_name", "")), -time.process_time())
            unfinished[threading.get_ident()].append(span)

    def reads(event: str, **_: Any) -> None:
        own = unfinished[threading.get_ident()]
        if event == FROM_CACHE and own:
            own[-1].stage = "read"

    def ends(event: str, duration_secs: float, **_: Any) -> None:
        own = unfinished[threading.get_ident()]
        if event not in STAGES or not own:
            return
        span = own.pop()
        whole = span.cpu_s + time.process_time()
        if own:
            own[-1].inner += whole
        span.cpu_s = whole - span.inner
        done.append(span)

    monitoring.register_scalar_listener(begins)
    monitoring.register_event_listener(reads)
    monitoring.register_event_duration_secs_listener(ends)
    try:
        yield done
    finally:
        monitoring.unregister_scalar_listener(begins)
        monitoring.unregister_event_listener(reads)
        monitoring.unregister_event_duration_listener(ends)
