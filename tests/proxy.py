"""A TCP proxy that can lose a request, or the reply to one, at an exact place; or be away for a while."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Side = Literal["request", "reply"]


class Proxy:
    """Between clients, who connect to `port`, and one server."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._armed: tuple[bytes, Side] | None = None
        #: Set when the armed cut has happened.
        self.cut_done = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._away = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, pattern: bytes, lost: Side) -> None:
        """At the next request that holds `pattern`, close the connection: once, before the server sees it
        (`request`), or after it has answered, so that only the answer is lost (`reply`)."""
        with self._lock:
            self.cut_done.clear()
            self._armed = pattern, lost

    def away(self) -> None:
        """Close every connection, and refuse new ones until `back`."""
        with self._lock:
            self._away = True
            _shut(*self._sockets)

    def back(self) -> None:
        with self._lock:
            self._away = False

    def close(self) -> None:
        """Stop listening and close every connection."""
        with self._lock:
            _shut(self._listener, *self._sockets)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    self._sockets |= {client, server}
                    if self._away:
                        _shut(client, server)
                losing = threading.Event()
                for run in (self._requests, self._replies):
                    threading.Thread(target=run, args=(client, server, losing), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                lost = self._loses(data)
                if lost == "request":
                    break
                if lost == "reply":
                    losing.set()
                server.sendall(data)
        self._end(client, server, cut=not losing.is_set())

    def _replies(self, client: socket.socket, server: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while (data := server.recv(65536)) and not losing.is_set():
                client.sendall(data)
        self._end(client, server, cut=True)

    def _loses(self, data: bytes) -> Side | None:
        with self._lock:
            if self._armed is None or self._armed[0] not in data:
                return None
            lost, self._armed = self._armed[1], None
            self._cutting = True
            return lost

    _cutting = False

    def _end(self, client: socket.socket, server: socket.socket, *, cut: bool) -> None:
        with self._lock:
            self._sockets -= {client, server}
            if cut and self._cutting:
                self._cutting = False
                self.cut_done.set()
        _shut(client, server)


def _shut(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """A proxy in front of the server at `host`:`port`."""
    made = Proxy(host, port)
    try:
        yield made
    finally:
        made.close()
