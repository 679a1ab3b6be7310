"""While the database is away one message tries, and the others wait for it: nothing is tried in vain."""

from __future__ import annotations

import threading
import time

from idemq.lanes import Item
from idemq.retry import pause

#: The longest rest between two tries, in seconds.
MAX_REST = 10.0


class Outage:
    """Whether the database is away for one consumer, and what waits for it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trying: Item | None = None
        self._waiting: list[Item] = []
        self._tries = 0
        self._answering_since = float("-inf")

    @property
    def lasts(self) -> bool:
        return self._trying is not None

    @property
    def answering_for(self) -> float:
        """How long the database has been answering, in seconds."""
        return time.monotonic() - self._answering_since

    def holds(self, item: Item) -> bool:
        """Whether `item` must wait; it comes back with `over`."""
        if self._trying is None:
            return False
        with self._lock:
            if self._trying is None or self._trying is item:
                return False
            self._waiting.append(item)
            return True

    def found(self, item: Item) -> tuple[float, Item] | None:
        """The database was away for `item`: after how many seconds which one tries next. None when another
        one tries already.

        They take turns: should the cause be in one message after all, the next one finds out.
        """
        with self._lock:
            self._waiting.append(item)
            if self._trying not in (None, item):
                return None
            self._trying = self._waiting.pop(0)
            self._tries += 1
            return min(pause(self._tries), MAX_REST), self._trying

    def noticed(self) -> None:
        """Something else than a message got no answer."""
        self._answering_since = time.monotonic()

    def over(self, item: Item, *, answered: bool) -> list[Item]:
        """The database has `answered`; or `item`, which may be the one that tries, is not ours any more.

        What waited goes on.
        """
        if self._trying is None:
            return []
        with self._lock:
            if self._trying is None or (self._trying is not item and not answered):
                return []
            self._trying = None
            waiting, self._waiting = self._waiting, []
            self._answering_since = time.monotonic()
            if answered:
                self._tries = 0
            return waiting
