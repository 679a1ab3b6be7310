"""The parent of the worker processes: starts them, starts again what dies, and passes signals on.

It spawns and never forks, holds no connection and runs no handler, so nothing of the user's can kill it.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

log = logging.getLogger("idemq.run")

#: A child that lived shorter than this many seconds is started again after a growing delay.
SHORT_LIFE = 10.0
#: The longest such delay, in seconds.
MAX_DELAY = 30.0
#: The exit code of a child that cannot start because of how the app is set up: starting it again is useless.
SETUP_ERROR = 2


def supervise(arguments: Sequence[str], count: int) -> int:
    """Run `idemq ARGUMENTS --child` in `count` processes until a signal; returns the exit code."""
    return _Supervisor(arguments, count).run()


class _Supervisor:
    def __init__(self, arguments: Sequence[str], count: int) -> None:
        self._command = [sys.executable, "-m", "idemq", *arguments, "--child"]
        self._count = count
        self._stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._code = 0

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        signal.signal(signal.SIGINT, lambda *_: self._stop())
        keepers = [threading.Thread(target=self._keep, daemon=True) for _ in range(self._count)]
        for keeper in keepers:
            keeper.start()
        for keeper in keepers:
            keeper.join()
        return self._code

    def _stop(self) -> None:
        """Once: the children stop in order. Twice: they end at once, as their own second signal."""
        self._stopping.set()
        for process in tuple(self._running):
            process.send_signal(signal.SIGTERM)

    def _keep(self) -> None:
        short_lives = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = self._run_one()
            if self._stopping.is_set():
                self._code = self._code or abs(code)
            elif code == SETUP_ERROR:
                self._code = code
                self._stop()
            else:
                short_lives = short_lives + 1 if time.monotonic() - started < SHORT_LIFE else 0
                delay = min(MAX_DELAY, 0.1 * 2**short_lives)
                log.error("a worker process ended (%s); started again in %.1f s", _words(code), delay)
                self._stopping.wait(delay)

    def _run_one(self) -> int:
        # A group of its own keeps Ctrl-C from reaching the children twice. The pipe tells them of our death.
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)
        self._running.add(process)
        if self._stopping.is_set():  # the signal came before the process was known
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        self._running.discard(process)
        return code


def _words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
