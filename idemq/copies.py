"""Copies of a message that is worked on here: they wait for it, and never reach the database beside it."""

from __future__ import annotations

import threading

from idemq.lanes import Item


class Copies:
    """The ids that this process works on, each with the copies that wait for it. Thread-safe.

    An id is held until its message is settled, also while that rests between two attempts: a copy would not
    wait as long as the message was told to.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working: dict[bytes, tuple[Item, list[Item]]] = {}

    def waits(self, item: Item) -> bool:
        """Whether `item` must wait, because a copy of it came first; it comes back with `settled`."""
        key = _key(item)
        if key is None:
            return False
        with self._lock:
            first, waiting = self._working.setdefault(key, (item, []))
            if first is item:
                return False
            waiting.append(item)
            return True

    def settled(self, item: Item) -> list[Item]:
        """What waited for `item`, which is settled now, or not ours any more."""
        key = _key(item)
        if key is None:
            return []
        with self._lock:
            first, waiting = self._working.get(key, (None, []))
            if first is item:
                del self._working[key]
                return waiting
            return []


def _key(item: Item) -> bytes | None:
    """None for what has no id, and for a parked message, of which nobody else has a copy."""
    return item.job.key if item.job is not None and item.job.row is None else None
