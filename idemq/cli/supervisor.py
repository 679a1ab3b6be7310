"""The parent of the worker processes: starts them, starts again what dies, and tells them to stop.

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
from queue import SimpleQueue

log = logging.getLogger("idemq.run")

#: A child that lived shorter than this many seconds is started again after a growing delay.
SHORT_LIFE = 10.0
#: The longest such delay, in seconds.
MAX_DELAY = 5.0
#: The exit code of a child that cannot start because of how the app is set up: starting it again is useless.
SETUP_ERROR = 2


def supervise(arguments: Sequence[str], count: int) -> int:
    """Run `idemq ARGUMENTS --child` in `count` processes until a signal; returns the exit code."""
    return Supervisor([sys.executable, "-m", "idemq", *arguments, "--child"], count).run()


class Supervisor:
    """Keeps `count` processes of `command` running until the first signal; the second kills them."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command = command
        self._count = count
        self._stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        #: Signals by their number, and a 0 for each keeper that ended. Handlers interrupt each other, so they
        #: may not take a lock; to put into this queue takes none.
        self._events: SimpleQueue[int] = SimpleQueue()
        self._code = 0

    def run(self) -> int:
        signal.signal(signal.SIGTERM, lambda number, _: self._events.put(number))
        signal.signal(signal.SIGINT, lambda number, _: self._events.put(number))
        for _ in range(self._count):
            threading.Thread(target=self._keep, daemon=True).start()
        signals = ended = 0
        while ended < self._count:
            number = self._events.get()
            if not number:
                ended += 1
                continue
            signals += 1
            self._stop()
            if signals > 1:
                self._code = 128 + number  # what a shell says of a process that the signal ended
                self._kill()
        return self._code

    def _stop(self) -> None:
        """The children stop in order. Not by a signal: they may have got the same one as we did, from a
        service manager that signals all processes, and would take ours for the second."""
        self._stopping.set()
        for process in tuple(self._running):
            _close_input(process)

    def _kill(self) -> None:
        for process in tuple(self._running):
            process.kill()  # safe at any instruction, and reaches one that is frozen, too

    def _keep(self) -> None:
        short_lives = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            code = self._run_one()
            if self._stopping.is_set():
                self._code = self._code or (128 - code if code < 0 else code)
            elif code == SETUP_ERROR:
                self._code = code
                self._stop()
            else:
                short_lives = short_lives + 1 if time.monotonic() - started < SHORT_LIFE else 0
                delay = min(MAX_DELAY, 0.1 * 2**short_lives)
                log.error("a worker process ended (%s); started again in %.1f s", _words(code), delay)
                self._stopping.wait(delay)
        self._events.put(0)

    def _run_one(self) -> int:
        # A group of its own keeps Ctrl-C from the children. The end of the pipe tells them to stop, also when
        # we are killed.
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)
        except OSError as error:  # no memory, no process left, or the interpreter is being replaced
            log.error("no worker process can be started: %s", error)
            return 1
        self._running.add(process)
        if self._stopping.is_set():  # the signal came before the process was known
            _close_input(process)
        code = process.wait()
        self._running.discard(process)
        _close_input(process)
        return code


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
