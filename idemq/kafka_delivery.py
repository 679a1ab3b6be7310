"""What the worker holds of Kafka: one record each, and how many of them are out."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Lock

from idemq.message import Message
from idemq.offsets import Tracker

#: So many finished records are worth a commit at once.
COMMIT_RECORDS = 500


class Flow:
    """How many deliveries of a subscription are unsettled. Outlives its consumers. Thread-safe.

    Wakes the loop at most once until the loop has looked again, so that settling stays cheap.
    """

    def __init__(self, prefetch: int, wake: Callable[[], None]) -> None:
        self.pid = os.getpid()
        self._lock = Lock()
        self._prefetch = prefetch
        self._wake = wake
        self._unsettled = 0
        self._finished = 0
        self._waiting = self._woken = self._paused = False

    def hand_out(self, count: int) -> bool:
        """Count `count` deliveries in, unless the subscription was paused meanwhile."""
        with self._lock:
            if not self._paused:
                self._unsettled += count
            return not self._paused

    def settled(self, finished: bool) -> None:
        with self._lock:
            self._unsettled -= 1
            self._finished += finished
            half_empty = self._waiting and self._unsettled <= self._prefetch // 2
            wake = not self._woken and (half_empty or self._finished >= COMMIT_RECORDS)
            self._woken = self._woken or wake
        if wake:
            self._wake()

    def room(self) -> int:
        """How many more may be delivered now."""
        with self._lock:
            room = 0 if self._paused else max(0, self._prefetch - self._unsettled)
            self._waiting = not room
            self._woken = False
            return room

    def committing(self) -> None:
        with self._lock:
            self._finished = 0
            self._woken = False

    def pause(self) -> None:
        with self._lock:
            self._paused = True


class KafkaDelivery:
    """One record, until it is settled or its epoch ends."""

    __slots__ = ("_flow", "_offset", "_settled", "_tracker", "message")

    def __init__(self, message: Message, tracker: Tracker, offset: int, flow: Flow) -> None:
        self.message = message
        self._tracker = tracker
        self._offset = offset
        self._flow = flow
        self._settled = False

    def start(self) -> bool:
        return self._flow.pid == os.getpid() and self._tracker.start(self._offset)

    def ack(self) -> None:
        if not self._settled:
            self._settled = True
            self._tracker.finished(self._offset)
            self._flow.settled(True)

    def rest(self) -> None:
        if not self._settled:
            self._tracker.resting(self._offset)

    def drop(self) -> None:
        if not self._settled:
            self._settled = True
            self._tracker.resting(self._offset)
            self._flow.settled(False)
