"""The demo's two providers of text messages, one HTTP server with a log of its own.

`/texts` honours idempotency keys. `/abroad` knows none, and drops the connection when the text has left. One
line for each request: `sent PAYMENT` for a text that left, `again PAYMENT` for a repeated one that sent none.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Gateway(ThreadingHTTPServer):
    """Listens on a free port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, log: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self._log = log.open("a", buffering=1)
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def text(self, payment: str, key: str | None) -> None:
        with self._lock:
            self._log.write(f"{'again' if key in self._seen else 'sent'} {payment}\n")
            if key is not None:
                self._seen.add(key)


class _Request(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        payment = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["payment"]
        if self.path == "/abroad":
            self.server.text(payment, None)
            self.close_connection = True
            return
        self.server.text(payment, self.headers["Idempotency-Key"])
        try:
            self.send_response(202)
            self.end_headers()
        except OSError:
            self.close_connection = True  # who asked was killed

    def log_message(self, format: str, *args: object) -> None:
        """The log of texts is the only one."""


if __name__ == "__main__":
    gateway = Gateway(Path(sys.argv[1]))
    sys.stdout.write(f"{gateway.server_port}\n")
    sys.stdout.flush()
    gateway.serve_forever()
