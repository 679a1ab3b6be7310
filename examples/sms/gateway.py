"""The text message gateway, somebody else's machine: `python gateway.py [PORT]`.

It honours idempotency keys, and has its bad moments: to each eighth new key happens one of `FAULTS`. Its
log, gateway.log, says `sent PAYMENT` for a text that left, `again PAYMENT` for a repeated request that sent
none, and `FAULT PAYMENT` for a bad moment.
"""

import json
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO

#: From a text to the answer that says so.
ANSWER_SECONDS = 0.02

#: Nothing is sent and the connection reset; the text is sent, and the answer is an error, or there is none
#: because the connection drops, or hangs, or it comes late.
FAULTS = ("refuse", "error", "drop", "hang", "slow")
EVERY = 8


class Gateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, log: IO[str]) -> None:
        super().__init__(("127.0.0.1", port), Request)
        self._log = log
        self._asked: set[str] = set()
        self._sent: set[str] = set()
        self._lock = threading.Lock()

    def fault(self, key: str, payment: str) -> str:
        """What goes wrong with this request; empty for nothing."""
        with self._lock:
            number = len(self._asked)
            if key in self._asked:
                return ""
            self._asked.add(key)
            if number % EVERY != EVERY // 2:
                return ""
            fault = FAULTS[number // EVERY % len(FAULTS)]
            print(fault, payment, file=self._log, flush=True)
            return fault

    def text(self, key: str, payment: str) -> None:
        with self._lock:
            print("again" if key in self._sent else "sent", payment, file=self._log, flush=True)
            self._sent.add(key)


class Request(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        payment = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["payment"]
        key = self.headers["Idempotency-Key"]
        fault = self.server.fault(key, payment)
        if fault == "refuse":
            self._reset()
            return
        self.server.text(key, payment)
        if fault == "drop":
            self._reset()
            return
        if fault == "hang":
            threading.Event().wait()
        time.sleep(50 * ANSWER_SECONDS if fault == "slow" else ANSWER_SECONDS)
        try:
            self.send_response(500 if fault == "error" else 202)
            self.end_headers()
        except OSError:
            self.close_connection = True  # who asked has gone

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            self.close_connection = True  # reset, or who asked has gone

    def log_message(self, format: str, *args: object) -> None:
        """gateway.log is the only log."""


if __name__ == "__main__":
    with Path("gateway.log").open("a") as log:
        gateway = Gateway(int(sys.argv[1]) if len(sys.argv) > 1 else 8025, log)
        print(f"http://127.0.0.1:{gateway.server_port}", flush=True)
        gateway.serve_forever()
