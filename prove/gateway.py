"""A text message gateway with faults, in a process of its own: `python -m prove.gateway LOG`.

It prints three ports: one that serves, one that resets each connection without reading, and one that nobody
listens on. A request goes to `/KIND`, with the payment in `X-Payment` and the fault in `X-Fault`; the fault
happens to the first request of a payment that gets here.

KIND   key      does nothing twice under one `Idempotency-Key`
       look-up  does what it is asked each time; GET /look-up with `Idempotency-Key` says whether it did
       none     does what it is asked each time, and tells nothing

The log has one line for each event, written before the answer: `sent PAYMENT`, `again PAYMENT` (nothing left)
and `asked PAYMENT`.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: How long the slow answer takes, in seconds, before the text leaves and after it.
SLOW = 0.2

FAULTS = ("no fault", "closed", "reset", "500", "drop", "hang", "slow")


class Gateway(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, log: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self._log = log.open("a", buffering=1)
        self._keys: set[str] = set()
        self._faulty: set[str] = set()
        self._lock = threading.Lock()

    def fault(self, payment: str, wanted: str) -> str:
        with self._lock:
            first = payment not in self._faulty
            self._faulty.add(payment)
        return wanted if first else "no fault"

    def text(self, kind: str, payment: str, key: str) -> None:
        with self._lock:
            done = kind == "key" and key in self._keys
            self._keys.add(key)
            self._log.write(f"{'again' if done else 'sent'} {payment}\n")

    def known(self, payment: str, key: str) -> bool:
        with self._lock:
            self._log.write(f"asked {payment}\n")
            return key in self._keys


class _Request(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        payment = self.headers["X-Payment"]
        fault = self.server.fault(payment, self.headers["X-Fault"])
        if fault == "slow":
            time.sleep(SLOW)
        self.server.text(self.path.strip("/"), payment, self.headers["Idempotency-Key"])
        if fault == "slow":
            time.sleep(SLOW)
        if fault == "hang":
            threading.Event().wait()
        if fault == "drop":
            self.close_connection = True
            return
        self._answer(500 if fault == "500" else 202)

    def do_GET(self) -> None:
        known = self.server.known(self.headers["X-Payment"], self.headers["Idempotency-Key"])
        self._answer(200, json.dumps(known).encode())

    def _answer(self, status: int, body: bytes = b"") -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # who asked was killed

    def log_message(self, format: str, *args: object) -> None:
        """The log of texts is the only one."""


def _resetting() -> int:
    """A port that resets each connection when a request comes, without reading it."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)

    def reset(connection: socket.socket) -> None:
        connection.recv(1, socket.MSG_PEEK)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=reset, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listening.getsockname()[1])


if __name__ == "__main__":
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound and never listening: nobody else gets it, and nobody answers
    gateway = Gateway(Path(sys.argv[1]))
    print(gateway.server_port, _resetting(), closed.getsockname()[1], flush=True)
    gateway.serve_forever()
