"""The consumer's side of the embedded broker: a thread for each subscription."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

from idemq.broker import Deliver
from idemq.embedded_file import Connection, errors, owners, transaction
from idemq.embedded_rows import fetch, give_back, is_ready, message_of, number_of
from idemq.errors import BrokerUnavailable, SetupError
from idemq.lockfile import LockFile, is_dead
from idemq.message import Message

log = logging.getLogger(__name__)

#: The shortest and the longest pause between two looks for messages, in seconds.
POLL = (0.005, 0.1)
#: How often a consumer that could take more looks for dead owners, in seconds.
LOOK = 0.1
#: How long acknowledgements are collected while at least half of the deliveries are unsettled, in seconds.
LINGER = 0.005
#: How long an unreachable file is left alone, in seconds.
RETRY = 1.0
#: Without having reached the file for so long, a consumer is not connected, in seconds.
SILENT = 10.0

#: The subscriptions of this process, to be woken by its own publishes.
_running: set[Subscription] = set()
os.register_at_fork(after_in_child=_running.clear)


def wake_all(path: Path, queue: str) -> None:
    for subscription in list(_running):
        if subscription.reads(path, queue):
            subscription.wake()


class EmbeddedDelivery:
    """One message, held by its subscription until that ends."""

    __slots__ = ("_seq", "_subscription", "message")

    def __init__(self, subscription: Subscription, seq: int, message: Message) -> None:
        self._subscription = subscription
        self._seq = seq
        self.message = message

    def start(self) -> bool:
        return self._subscription.holds(self._seq)

    def ack(self) -> None:
        self._subscription.ack(self._seq)

    def rest(self) -> None:
        """It stays with this subscription."""

    def drop(self) -> None:
        """Nothing to do: closing the subscription gives back all that it holds."""


class Subscription:
    """A consumer of one queue: a thread that fetches, and deletes what was acknowledged, in one transaction.

    Its epoch is its own life. While the file cannot be reached it keeps what it holds, because it alone could
    give that to somebody else; others take it over only when the lock file is free.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        path: Path,
        queue: str,
        broker: str,
        consumer: str,
        deliver: Deliver,
        prefetch: int,
    ) -> None:
        self._connect = connect
        self._path = path
        self._queue = queue
        self._consumer = consumer
        self._deliver = deliver
        self._prefetch = prefetch
        self._failure: BaseException | None = None
        self._reached = -SILENT
        self._changed = threading.Condition()  # guards all that follows
        self._held: set[int] = set()  # delivered and unsettled
        self._acked: list[int] = []  # settled, and not yet deleted
        self._paused = self._closing = self._woken = False
        self._process = os.getpid()
        self._token = uuid4().hex
        self._owner: LockFile | None = None
        self._origin = {"broker": broker, "queue": queue}
        _running.add(self)
        self._thread = threading.Thread(target=self._run, name=f"idemq embedded {consumer}", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    @property
    def connected(self) -> bool:
        return self._thread.is_alive() and time.monotonic() - self._reached < SILENT

    def pause(self) -> None:
        self._paused = True

    def close(self, timeout: float) -> None:
        if os.getpid() != self._process:
            raise SetupError(
                f"consumer {self._consumer!r} belongs to the process that this one was forked from"
            )
        with self._changed:
            self._closing = True
        self.wake()
        self._thread.join(max(timeout, 0.0))
        self._end()

    def holds(self, seq: int) -> bool:
        return seq in self._held and not self._closing and os.getpid() == self._process

    def ack(self, seq: int) -> None:
        if os.getpid() != self._process:
            return  # a forked child: the lock below may have been held at the fork
        with self._changed:
            if seq in self._held:
                self._held.discard(seq)
                self._acked.append(seq)
                if len(self._acked) == 1 or len(self._acked) >= len(self._held):
                    self._changed.notify()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify()

    def reads(self, path: Path, queue: str) -> bool:
        return path == self._path and queue == self._queue

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    with closing(self._connect()) as connection:
                        self._consume(connection)
                except BrokerUnavailable as error:
                    log.warning("consumer %r: %s; trying again", self._consumer, error)
                    with self._changed:
                        self._changed.wait_for(lambda: self._closing, RETRY)
        except BaseException as error:
            self._failure = error
            log.error(
                "consumer %r ended: %s", self._consumer, error, exc_info=not isinstance(error, SetupError)
            )
        finally:
            self._end()

    def _consume(self, connection: Connection) -> None:
        with errors(self._path):
            number, owner = self._register(connection)
        pause, looked = POLL[0], 0.0
        while True:
            with self._changed:
                closing, acked = self._closing, list(self._acked)
                free = 0 if self._paused else self._prefetch - len(self._held)
            with errors(self._path):
                if free and time.monotonic() >= looked + LOOK:
                    self._take_over(connection, number, owner)
                    looked = time.monotonic()
                rows = self._exchange(connection, number, owner, acked, free, closing)
            with self._changed:
                del self._acked[: len(acked)]
                self._held.update(row[0] for row in rows)
            self._reached = time.monotonic()
            if closing:
                return
            if rows:
                self._deliver([EmbeddedDelivery(self, row[0], message_of(row, self._origin)) for row in rows])
            pause = POLL[0] if rows or acked else min(2 * pause, POLL[1])
            self._wait(pause)

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._woken or self._acked, seconds)
            if self._acked:
                self._changed.wait_for(lambda: self._woken or len(self._acked) >= len(self._held), LINGER)
            self._woken = False

    def _register(self, connection: Connection) -> tuple[int, int]:
        """The numbers of the queue and of this owner, after a first and after a lost connection."""
        if self._owner is None:
            self._owner = LockFile(owners(self._path) / self._token)
        with transaction(connection):
            number = number_of(connection, self._queue)
            token = self._token.encode()
            connection.execute("INSERT OR IGNORE INTO owners (token, queue) VALUES (?, ?)", (token, number))
            (owner,) = connection.execute("SELECT id FROM owners WHERE token = ?", (token,)).fetchone()
            with self._changed:
                known = self._held.union(self._acked)
            # Fetched by a commit that seemed to fail: never delivered, so nobody would settle it.
            mine = connection.execute("SELECT seq FROM messages WHERE owner = ?", (owner,)).fetchall()
            lost = [row for row in mine if row[0] not in known]
            connection.executemany("UPDATE messages SET owner = NULL, redelivered = 1 WHERE seq = ?", lost)
        return number, owner

    def _take_over(self, connection: Connection, number: int, owner: int) -> None:
        others = "SELECT id, token FROM owners WHERE queue = ? AND id <> ?"
        for other, token in connection.execute(others, (number, owner)).fetchall():
            lock = owners(self._path) / token.decode()
            if is_dead(lock):
                with transaction(connection):
                    give_back(connection, other)
                lock.unlink(missing_ok=True)

    def _exchange(
        self, connection: Connection, number: int, owner: int, acked: list[int], free: int, closing: bool
    ) -> list[tuple[Any, ...]]:
        """Delete what was acknowledged, and fetch up to `free`; when closing, give back all else."""
        if not connection.is_current():
            raise SetupError(f"the embedded broker at {self._path} was removed or replaced")
        if free and not is_ready(connection, number):
            free = 0
        if not (acked or free or closing):
            return []
        with transaction(connection):
            gone = [(seq, owner) for seq in acked]
            connection.executemany("DELETE FROM messages WHERE seq = ? AND owner = ?", gone)
            if closing:
                give_back(connection, owner)
            if closing or not free:
                return []
            if not connection.execute("SELECT 1 FROM owners WHERE id = ?", (owner,)).fetchone():
                raise SetupError(
                    f"the lock file of consumer {self._consumer!r} was removed; it counts as dead"
                )
            return fetch(connection, number, owner, free)

    def _end(self) -> None:
        """From here on nothing is settled any more, and others may take over what is left."""
        with self._changed:
            self._closing = True
            self._held.clear()
        if self._owner is not None:
            self._owner.release()
        _running.discard(self)
        wake_all(self._path, self._queue)
