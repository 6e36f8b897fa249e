"""A relay in front of jax's coordination service that keeps quiet when the service is gone.

jax's client aborts its process, with a C++ stack, when its connection breaks. Behind the relay it
does not break until this process leaves: `kvjax.processes.peers` says what happened.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from kvjax.processes.sockets import CONNECT, in_thread, listen


class Relay:
    """Passes jax's connections on to process 0."""

    def __init__(self, leaving: threading.Event):
        """Once `leaving` is set, connections may break."""
        self._joined = threading.Event()
        self._leaving = leaving

    def joined(self) -> None:
        """From now on connections stay open; until then, jax's client may try again."""
        self._joined.set()

    def start(self, host: str, port: int) -> int:
        """Passes connections on to host:port; returns the port of this machine to connect to."""
        server = listen("127.0.0.1")
        in_thread(self._pass_on, server, (host.strip("[]"), port))
        return server.getsockname()[1]

    def _pass_on(self, server: socket.socket, target: tuple[str, int]) -> None:
        while True:
            near, _ = server.accept()
            in_thread(self._carry, near, target)

    def _carry(self, near: socket.socket, target: tuple[str, int]) -> None:
        try:
            far = socket.create_connection(target, CONNECT)
        except OSError:
            self._hold()
            near.close()
            return
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        in_thread(self._pump, near, far, far)
        self._pump(far, near, far)

    def _pump(self, source: socket.socket, sink: socket.socket, far: socket.socket) -> None:
        while True:
            broken = source
            try:
                data = source.recv(1 << 16)
                if not data:
                    break
                broken = sink
                sink.sendall(data)
            except OSError:
                break
        if broken is far:
            self._hold()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _hold(self) -> None:
        if self._joined.is_set():
            self._leaving.wait()
