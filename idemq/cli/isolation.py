"""Starts the process that runs a consumer's suspects, and keeps it on a leash."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from uuid import uuid4

from idemq.cli.supervisor import SETUP_ERROR

log = logging.getLogger("idemq.run")

#: Seconds before a process that cannot start is tried again.
RETRY_START = 30.0


@dataclass(frozen=True, slots=True)
class _Cell:
    owner: bytes
    process: subprocess.Popen[bytes]

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


class Isolation:
    """One process for each consumer that has suspects; they leave when there are none, and when we do."""

    def __init__(self, app: str, log_format: str, grace: float) -> None:
        self._command = [sys.executable, "-m", "idemq", "run", app, "--child", "--log-format", log_format]
        self._command += ["--grace", str(grace)]
        self._grace = grace
        self._lock = threading.Lock()
        self._cells: dict[str, _Cell] = {}
        self._not_before: dict[str, float] = {}
        self._closed = False

    def start(self, consumer: str) -> None:
        """See to it that a process runs the consumer's suspects. Never raises an Exception."""
        with self._lock:
            if self._closed or consumer in self._cells:
                return
            if time.monotonic() < self._not_before.get(consumer, 0.0):
                return
            owner = uuid4()
            command = [*self._command, "--only", consumer, "--suspects", owner.hex]
            try:
                # A group of its own keeps Ctrl-C from it; the end of the pipe tells it to stop.
                process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
            except OSError as error:  # no memory, or no process left
                log.error("%s: no process for suspects can be started: %s", consumer, error)
                return
            self._cells[consumer] = _Cell(owner.bytes, process)

    def ended(self, consumer: str) -> bytes | None:
        """The owner of what was picked by a process that ended by itself; told once."""
        with self._lock:
            cell = self._cells.get(consumer)
            if cell is None or (code := cell.process.poll()) is None:
                return None
            del self._cells[consumer]
            cell.let_go()
            if code == 0:
                return None
            if code == SETUP_ERROR:
                self._not_before[consumer] = time.monotonic() + RETRY_START
            log.warning("%s: the process that ran suspects ended (%d)", consumer, code)
            return cell.owner

    def let_go(self) -> None:
        """Start no more, and let what runs come to its end. Safe in a signal handler of the main thread,
        which does nothing else here."""
        with self._lock:
            self._closed = True
            for cell in self._cells.values():
                cell.let_go()

    def close(self) -> None:
        """`let_go`, and wait for the end."""
        self.let_go()
        end = time.monotonic() + self._grace + 5.0
        for cell in self._cells.values():
            try:
                cell.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                cell.process.kill()
