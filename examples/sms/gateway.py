"""The text message gateway, somebody else's machine: `python gateway.py [PORT]`.

It honours idempotency keys and keeps its own log, gateway.log: `sent KEY` for a text that left, `again KEY`
for a repeated request that sent none. The answer takes a moment, because it is far away.
"""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

#: From a text to the answer that says so.
ANSWER_SECONDS = 0.02


class Gateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, log: IO[str]) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self._log = log
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def text(self, key: str) -> None:
        with self._lock:
            print("again" if key in self._seen else "sent", key, file=self._log, flush=True)
            self._seen.add(key)


class Request(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.text(self.headers["Idempotency-Key"])
        time.sleep(ANSWER_SECONDS)
        self.send_response(202)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """gateway.log is the only log."""


if __name__ == "__main__":
    with Path("gateway.log").open("a") as log:
        gateway = Gateway(int(sys.argv[1]) if len(sys.argv) > 1 else 8025, log)
        print(f"http://127.0.0.1:{gateway.server_port}", flush=True)
        gateway.serve_forever()
