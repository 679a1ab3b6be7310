"""How far one Kafka partition may be committed during one assignment, and what a commit tells the next owner.

Guarantees that `committable` never passes a delivered record that is not finished, in whatever order records
are finished, and whatever gaps the offsets have; and that a record which was under way when its owner ended
is a suspect for the next one.

Each commit carries a mark, as its metadata: `open by OWNER` while an epoch lives, `left` when it ended in
order. `open to OFFSET` limits the suspects: its owner left, but work on records before that offset was under
way. `open` alone comes from an owner that has itself suspects which are not settled.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from threading import Lock

#: Records of one partition that may be delivered and not yet committed; then it waits for the oldest.
CAP = 1_000

LEFT = "left"
_OPEN = re.compile(r"open(?: by (?P<owner>[0-9a-f]+))?(?: to (?P<before>[0-9]{1,19}))?")
_EVERYTHING = 2**63


def open_mark(owner: str | None, before: int | None = None) -> str:
    """`owner` is None when suspects of an earlier owner are not settled: then they are suspects for all."""
    by = f" by {owner}" if owner is not None else ""
    return f"open{by}" if before is None else f"open{by} to {before}"


def suspects_before(mark: str | None, owner: str) -> int:
    """Before which offset records are suspects for `owner`; 0: none are. Any client may have left `mark`.

    An owner that finds its own mark has not died of what it had.
    """
    found = _OPEN.fullmatch(mark or "")
    if found is None or found["owner"] == owner:
        return 0
    return int(found["before"] or _EVERYTHING)


class Tracker:
    """One partition during one assignment (an epoch): what was delivered, started and finished. Thread-safe.

    Nothing may be delivered before it has `begun`. It ends with the assignment; what comes later, a late
    acknowledgement above all, changes nothing.
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
        self._start: int | None = None
        self._suspects_before = 0
        self._startable = True
        self._ended = False

    def begin(self, position: int, suspects_before: int) -> None:
        """Our mark is being committed at `position`, the group's. Of the records before `suspects_before` the
        first `CAP` are suspects: no owner has more uncommitted."""
        with self._lock:
            self._start = position
            self._suspects_before = suspects_before

    @property
    def begun(self) -> bool:
        """The group has our mark."""
        return self._committed is not None

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
                if self._delivered == CAP:
                    self._suspects_before = min(self._suspects_before, offset + 1)

    def suspect(self, offset: int) -> bool:
        """Whether an owner that did not leave in order may have had this delivered record in hand."""
        return offset < self._suspects_before

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
        """The broker confirmed `position`, as `begin` took it or `committable` gave it last."""
        with self._lock:
            self._committed = position
            if self._offered is not None and self._offered[0] == position:
                self._passed_at_commit = self._offered[1]

    def mark(self, position: int, owner: str) -> str:
        """What an ordinary commit of `position` carries."""
        return open_mark(None if position < self._suspects_before else owner)

    def leaving(self, owner: str) -> tuple[int, str] | None:
        """The last position and its mark, when nothing is started any more; None if it never began."""
        with self._lock:
            if self._ended or self._start is None:
                return None
            self._advance()
            position = self._start if self._position is None else self._position
            before = max(self._suspects_before, *(offset + 1 for offset in self._running), 0)
            if before <= position:
                return position, LEFT
            return position, open_mark(None if position < self._suspects_before else owner, before)

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
