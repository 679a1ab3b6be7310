"""How far one Kafka partition may be committed during one assignment.

Guarantees that `committable` never passes a delivered record that is not finished, in whatever order records
are finished, and whatever gaps the offsets have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from threading import Lock


class Tracker:
    """One partition during one assignment (an epoch): what was delivered, started and finished. Thread-safe.

    It ends with the assignment; what comes later, a late acknowledgement above all, changes nothing.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._order: deque[int] = deque()  # delivered and not yet passed, oldest first
        self._open: set[int] = set()  # delivered, not finished
        self._running: set[int] = set()  # started, neither finished nor resting
        self._highest: int | None = None
        self._position: int | None = None  # everything before it is finished
        self._committed: int | None = None
        self._offered: tuple[int, int] | None = None  # the position being committed, and the count at it
        self._delivered = self._passed = self._passed_at_commit = 0
        self._startable = True
        self._ended = False

    def delivered(self, offsets: Iterable[int]) -> None:
        """Records are handed out, in rising order. An offset that is not above all earlier ones is refused:
        the partition was made anew, and needs a tracker of its own."""
        with self._lock:
            for offset in offsets:
                if self._highest is not None and offset <= self._highest:
                    raise ValueError(f"offset {offset} after {self._highest}")
                self._highest = offset
                self._order.append(offset)
                self._open.add(offset)
                self._delivered += 1

    def start(self, offset: int) -> bool:
        """Whether the record may be worked on now."""
        with self._lock:
            if not self._startable:
                return False
            self._running.add(offset)
            return True

    def finished(self, offset: int) -> None:
        with self._lock:
            self._running.discard(offset)
            if not self._ended:
                self._open.discard(offset)

    def resting(self, offset: int) -> None:
        """Nobody works on it now; unfinished, it holds the position."""
        with self._lock:
            self._running.discard(offset)

    def skipped_to(self, position: int) -> None:
        """The consumer will read at `position` next, and everything before it that exists was delivered.

        Counts only while nothing is unfinished: this is how compacted records, aborted transactions and
        control records at the end of a partition are passed.
        """
        with self._lock:
            if self._ended or self._open:
                return
            self._advance()
            if self._position is None or position > self._position:
                self._position = position

    def committable(self) -> int | None:
        """The position to commit now; None when there is none, or it is committed already."""
        with self._lock:
            if self._ended:
                return None
            self._advance()
            if self._position is None or self._position == self._committed:
                return None
            self._offered = (self._position, self._passed)
            return self._position

    def _advance(self) -> None:
        while self._order and self._order[0] not in self._open:
            self._position = self._order.popleft() + 1
            self._passed += 1

    def committed(self, position: int) -> None:
        """The broker confirmed `position`, as `committable` gave it last."""
        with self._lock:
            self._committed = position
            if self._offered is not None and self._offered[0] == position:
                self._passed_at_commit = self._offered[1]

    def stop_starting(self) -> None:
        """The assignment is about to end: `start` says no from now on; `finished` still counts."""
        with self._lock:
            self._startable = False

    def end(self) -> None:
        with self._lock:
            self._startable = False
            self._ended = True

    @property
    def unfinished(self) -> bool:
        return bool(self._open)

    @property
    def running(self) -> int:
        """How many records are started and not settled."""
        return len(self._running)

    @property
    def uncommitted(self) -> int:
        """How many delivered records lie after the committed position."""
        return self._delivered - self._passed_at_commit

    @property
    def next_offset(self) -> int | None:
        """Where to read on after the last delivered record; None before the first."""
        return None if self._highest is None else self._highest + 1
