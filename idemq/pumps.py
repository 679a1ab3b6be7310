"""Pumps: each sends what is due for one broker or one effect, in a thread of its own.

A pump asks for rows that are due, by state and never by position, so that a row whose transaction commits
late is found like any other. What it holds when its process dies is due again, or in doubt, when the lease
ends. Whatever fails is tried again for ever; nothing is raised.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar
from uuid import uuid4

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq import outgoing
from idemq.bridge import EventLoop
from idemq.broker import Broker, Publisher
from idemq.drivers import is_contention
from idemq.outgoing import REPLY, Messages, Row
from idemq.packing import shown, words
from idemq.retry import pause

log = logging.getLogger("idemq.relay")

T = TypeVar("T")

#: How often the database is asked for rows that other processes have planned, in seconds.
LOOK_EVERY = 0.25

#: How many messages are published in one batch, and how long a broker may take for it, in seconds.
BATCH = 500
PUBLISH_WITHIN = 15.0
#: So often an answer is offered to a broker that does not take it; then who asked has gone.
REPLY_TRIES = 6
#: Lock time-outs and the like in a row that are nothing to tell of.
CONTENDED = 3


class Database:
    """Runs one step after another, each on a connection that is given back: the relay needs one in all."""

    def __init__(self, engine: Engine | AsyncEngine, loop: EventLoop | None) -> None:
        self._engine, self._loop = engine, loop
        self._lock = threading.Lock()

    def run(self, step: Callable[[Connection], T]) -> T:
        """Raises database errors."""
        with self._lock:
            if isinstance(self._engine, Engine):
                with self._engine.connect() as connection:
                    return step(connection)
            assert self._loop is not None
            return self._loop.run(_stepped(self._engine, step))


async def _stepped(engine: AsyncEngine, step: Callable[[Connection], T]) -> T:
    async with engine.connect() as connection:
        return await connection.run_sync(step)


class Rows(Protocol):
    def reap(self, connection: Connection) -> None: ...


class Pump(threading.Thread, ABC):
    """Sends what is due for one broker or effect, until `stop`."""

    def __init__(self, title: str, database: Database, rows: Rows) -> None:
        super().__init__(name=f"idemq-relay-{title}", daemon=True)
        self.title, self.database = title, database
        self.counts: Counter[str] = Counter()
        self.stopping = threading.Event()
        self._rows, self._reaped = rows, float("-inf")
        self._woken = threading.Event()

    def wake(self) -> None:
        """Something may be due."""
        self._woken.set()

    def stop(self) -> None:
        self.stopping.set()
        self._woken.set()

    def run(self) -> None:
        failures = 0
        while not self.stopping.is_set():
            self._woken.clear()
            try:
                if time.monotonic() >= self._reaped + outgoing.LEASE / 4:
                    self._reap()
                    self._reaped = time.monotonic()
                more = self.round()
                failures = 0
            except Exception as error:
                failures += 1
                rest = pause(failures)
                if isinstance(error, DBAPIError) and is_contention(error) and failures <= CONTENDED:
                    self.stopping.wait(rest / 10)
                    continue
                log.warning("%s: %s; tried again in %.1f s", self.title, shown(words(error)), rest)
                self.stopping.wait(rest)
                continue
            if not more:
                self._woken.wait(LOOK_EVERY)
        self.leave()

    def _reap(self) -> None:
        """What others held that have died is due again. Raises database errors."""
        self.database.run(self._rows.reap)

    @abstractmethod
    def round(self) -> bool:
        """Send what is due; whether there may be more. Raises what it cannot mend."""

    def leave(self) -> None:
        """Called once, at the end."""


class MessagePump(Pump):
    """Publishes the messages to one broker: each is deleted only when the broker has confirmed it."""

    def __init__(self, broker: Broker, database: Database, schema: str | None) -> None:
        self._messages = Messages(broker.name, uuid4().bytes, schema)
        super().__init__(broker.name, database, self._messages)
        self._publisher: Publisher = broker.publisher()
        self._batch = BATCH

    def round(self) -> bool:
        batch = self._batch
        self._batch = max(1, batch // 2)  # of more than a broker confirms in time nothing would ever be done
        rows = self.database.run(lambda connection: self._messages.pick(connection, batch))
        left = {row.seq: row for row in rows}
        end = time.monotonic() + outgoing.LEASE / 2
        try:
            while left and not self.stopping.is_set() and time.monotonic() < end:
                first = _first_of_lanes(left.values())
                refused = self._publish(first)
                for row in first:
                    del left[row.seq]
                held = {row.lane for row in refused} - {None}
                if any(row.lane in held for row in left.values()):
                    break  # these wait for the one before them, which is due again later
        finally:
            if left:
                unsent = [(row, None, 0.0) for row in left.values()]
                self.database.run(lambda connection: self._messages.unsent(connection, unsent))
        self._batch = min(BATCH, 2 * batch)
        return len(rows) == batch

    def _publish(self, batch: list[Row]) -> list[Row]:
        """Those that the broker does not take. Raises `BrokerUnavailable`."""
        try:
            answers = self._publisher.publish([(row.address, row.message) for row in batch], PUBLISH_WITHIN)
        except BaseException:
            self._publisher.close()
            raise
        sent, refused = [], []
        for row, why in zip(batch, answers, strict=True):
            if why is None:
                sent.append(row)
            elif row.kind == REPLY and row.attempts >= REPLY_TRIES:
                log.warning(
                    "%s: who waited at %r has gone: %s", self.title, " ".join(row.address), shown(why)
                )
                sent.append(row)
            else:
                refused.append((row, why, pause(row.attempts)))
        if sent:
            self.database.run(lambda connection: self._messages.sent(connection, sent))
        if refused:
            self.database.run(lambda connection: self._messages.unsent(connection, refused))
        self.counts += Counter(published=len(sent), refused=len(refused))
        for row, why, rest in refused:
            where = " ".join(row.address)
            text = "%s: it does not take message %r to %r: %s; it waits here, tried again in %.0f s"
            log.error(text, self.title, row.message.id, where, shown(why), rest)
        return [row for row, _, _ in refused]

    def leave(self) -> None:
        self._publisher.close()


def _first_of_lanes(rows: Iterable[Row]) -> list[Row]:
    """All without a lane, and of each lane the first: when one is refused, none after it has been sent."""
    lanes: set[bytes] = set()
    first = []
    for row in rows:
        if row.lane is None or row.lane not in lanes:
            first.append(row)
        if row.lane is not None:
            lanes.add(row.lane)
    return first
