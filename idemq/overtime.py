"""Handlers that run on after their deadline: a thread cannot be stopped, only its process."""

from __future__ import annotations

import logging
import threading
import time

from idemq.lanes import Item

log = logging.getLogger("idemq.worker")

#: How long a handler may run on after its deadline before its process is ended, in seconds.
OVERTIME = 10.0


class Timed:
    """The attempts of one consumer that run now and have a deadline. Thread-safe."""

    def __init__(self, consumer: str) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self._running: set[Item] = set()

    def begin(self, item: Item) -> None:
        if item.job is not None:
            item.job.deadline = None  # that of an earlier attempt; this one's begins with its handler
        with self._lock:
            self._running.add(item)

    def end(self, item: Item) -> None:
        with self._lock:
            self._running.discard(item)

    def late(self) -> Exception | None:
        """Why the process must end, if a handler does not."""
        with self._lock:
            running = list(self._running)
        for item in running:
            deadline = item.job.deadline if item.job is not None else None
            over = time.monotonic() - deadline if deadline is not None else 0.0
            if over > OVERTIME:
                return RuntimeError(f"{item.id!r} runs {over:.0f} s past its deadline")
            if over > 0 and not item.told:
                item.told = True
                log.warning("%s: %r runs longer than its deadline; it will fail", self._consumer, item.id)
        return None
