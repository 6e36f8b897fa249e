"""Notices at once when another process of a run is gone, and ends this one with a line about it.

jax alone notices a killed process after 100 s of missed heartbeats, while the others hang in a
collective; where process 0 is killed, which has jax's coordination service, jax's clients abort the
others at once with a C++ stack. So every process keeps a connection to process 0 that carries
nothing until the end: the system closes it when its owner dies, however it dies, and gives it up
when a host no longer answers. jax's own connection goes through `kvjax.processes.relay`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from kvjax.processes.sockets import CONNECT, in_thread, listen

GONE = 75
"""Exit code of a process whose peer is gone: "try again" (EX_TEMPFAIL)."""

GRACE = 1.0
"""Seconds for this process to end on an error of its own, the same one most likely."""

QUIET = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A host that does not answer for half a minute is gone; names as far as the system has them."""

LINE = (
    "error: process {index} is gone (killed, out of memory, an error of its own, or its host is "
    "down), so this one stops; start all processes again with the same command, and the run goes "
    "on where it was\n"
)


@contextlib.contextmanager
def limited(seconds: float, otherwise: str) -> Iterator[None]:
    """Ends the process, with one line, when what is inside takes longer; it may hang in C++."""

    def stop() -> None:
        os.write(2, f"error: {otherwise}\n".encode())
        os._exit(GONE)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Peers:
    """One process's connections to the others of its run."""

    def __init__(self, leaving: threading.Event):
        """Once `leaving` is set, the others may end."""
        self._leaving = leaving
        self._speaking = threading.Lock()
        self._others: list[socket.socket] = []

    def serve(self, host: str) -> tuple[int, str]:
        """Process 0 waits for the others' connections.

        Args:
            host: under which the others reach it.

        Returns:
            The port, and the word by which they are known.
        """
        server = listen(host)
        word = secrets.token_hex(8)
        in_thread(self._accept, server, word)
        return server.getsockname()[1], word

    def connect(self, host: str, port: int, word: str, index: int) -> None:
        """Process `index` watches process 0, and is watched.

        Raises:
            OSError: it cannot be reached.
        """
        connection = socket.create_connection((host.strip("[]"), port), CONNECT)
        connection.sendall(f"{word} {index}\n".encode())
        in_thread(self._watch, connection, "0")

    def _accept(self, server: socket.socket, word: str) -> None:
        while True:
            connection, _ = server.accept()
            in_thread(self._greet, connection, word)

    def _greet(self, connection: socket.socket, word: str) -> None:
        # Anyone may knock: who does not know the word is nobody's process.
        try:
            connection.settimeout(CONNECT)
            known, _, index = connection.makefile("r").readline(64).strip().partition(" ")
        except (OSError, ValueError):
            known, index = "", ""
        if secrets.compare_digest(known.encode(), word.encode()):
            self._others.append(connection)
            self._watch(connection, index)
        connection.close()

    def _watch(self, connection: socket.socket, index: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in QUIET.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        said = b""
        with contextlib.suppress(OSError):
            said = connection.recv(16)
        if not self._leaving.is_set():
            self._stop(said.decode() or index)

    def _stop(self, index: str) -> None:
        for connection in self._others:  # these see process 0 go next, which is not to blame
            with contextlib.suppress(OSError):
                connection.sendall(index.encode())
        time.sleep(GRACE)
        with self._speaking:  # never let go of: the first one ends the process
            os.write(2, LINE.format(index=index).encode())
            os._exit(GONE)
