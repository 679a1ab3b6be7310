"""The demo's text message gateway: an HTTP server that honours idempotency keys and keeps its own log.

One line for each request: `sent KEY` for a text that left, `again KEY` for a repeated request that sent none.
"""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Gateway(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface."""

    daemon_threads = True

    def __init__(self, log: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self._log = log.open("a", buffering=1)
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def text(self, key: str) -> None:
        with self._lock:
            self._log.write(f"{'again' if key in self._seen else 'sent'} {key}\n")
            self._seen.add(key)


class _Request(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.text(self.headers["Idempotency-Key"])
        self.send_response(202)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """The log of texts is the only one."""


if __name__ == "__main__":
    gateway = Gateway(Path(sys.argv[1]))
    sys.stdout.write(f"{gateway.server_port}\n")
    sys.stdout.flush()
    gateway.serve_forever()
