"""Several processes as one run: how they find each other, who writes, and how they end.

A process joins with `join`, before anything else of jax is used. Then `jax.devices()` are the
devices of all of them. All run the same program; what only one may write, process 0 writes.
"""

from kvjax.processes.peers import GONE
from kvjax.processes.start import VARIABLE, asked, join, parse, take_flag
from kvjax.processes.work import barrier, is_writer, on_writer, several, share, stop, together

__all__ = [
    "GONE",
    "VARIABLE",
    "asked",
    "barrier",
    "is_writer",
    "join",
    "on_writer",
    "parse",
    "several",
    "share",
    "stop",
    "take_flag",
    "together",
]
