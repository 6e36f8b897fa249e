"""Sockets between the processes of a run."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

CONNECT = 20.0
"""Seconds to reach another process."""


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def listen(host: str, port: int = 0) -> socket.socket:
    """A server for those who know it by `host`: all of the network, unless that is loopback.

    Raises:
        OSError: the port is taken.
    """
    if is_loopback(host) or not socket.has_dualstack_ipv6():
        host = host.strip("[]") if is_loopback(host) else ""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)


def check_free(host: str, port: int) -> None:
    """Raises ValueError where process 0 cannot have the port; some versions of jax crash then."""
    try:
        listen(host, port).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot have port {port} ({error.strerror}), expected a free one"
        ) from None


def in_thread(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls it in a thread of its own, which does not keep the process from ending."""
    threading.Thread(target=function, args=arguments, daemon=True).start()
