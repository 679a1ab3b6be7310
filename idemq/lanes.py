"""The lanes of a consumer: each works on one message at a time, with a unit of its own; sync or async."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.attempts import AsyncUnit, SyncUnit
from idemq.broker import Delivery, Source
from idemq.declared import Consumer
from idemq.failures import Job
from idemq.message import Message, Release
from idemq.packing import shown
from idemq.parking import LEASE, Found

if TYPE_CHECKING:
    from idemq.consuming import ConsumerWorker

#: How many parked messages a lane picks at a time, unless they take long.
PICK = 10


@dataclass(frozen=True, slots=True)
class Feed:
    """What a consumer is run with: its declaration, where from, and how many at a time."""

    consumer: Consumer
    source: Source
    concurrency: int
    prefetch: int
    number: int
    trigger: bool = False


class Isolation(Protocol):
    """Processes that run suspects alone."""

    def start(self, consumer: str) -> None:
        """See to it that one runs the consumer's suspects. Never raises an Exception."""
        ...

    def ended(self, consumer: str) -> bytes | None:
        """The owner of what was picked by one that ended by itself; told once."""
        ...


@dataclass(slots=True, eq=False)
class Item:
    """A delivery, or a parked message, that the worker has until it is settled."""

    delivery: Delivery
    job: Job | None = None
    releases: int = 0
    #: Its key, while it is the one of its key that may be worked on, or waits to be.
    lane: bytes | None = None
    #: Since when its twin is in flight elsewhere.
    kept_since: float | None = None
    #: It was said that it runs past its deadline.
    told: bool = False

    @property
    def id(self) -> str:
        """The message's id, for log lines."""
        return shown(self.job.message.id or "") if self.job is not None else ""


@dataclass(frozen=True, slots=True)
class Look:
    """Look for parked messages that are due, and run them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The delivery of a parked message: the broker has been told of it already."""

    message: Message

    def start(self) -> bool:
        return True

    def ack(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def drop(self) -> None:
        pass


class Suspicion:
    """Which of the messages that are delivered again are suspects.

    Of a queue, as many in a row as an owner or two had in hand, because the queue's limit of deliveries may
    drop them; after its broker crashed, a queue gives everything again. A partition's log gives again what
    nobody had begun as well: there, the first few that no claim absorbs, as many as an owner can have been
    working on. Whatever is missed ends the next process, and is among the first then.
    """

    def __init__(self, concurrency: int, prefetch: int) -> None:
        self._most_of_partition, self._most_of_queue = 2 * concurrency + 6, 2 * prefetch
        self._parked: Counter[object] = Counter()

    def of(self, message: Message) -> bool:
        if message.redelivered:
            partition = _partition(message)
            most = self._most_of_queue if partition is None else self._most_of_partition
            return self._parked[partition] < most
        if self._parked:
            self._parked.pop(_partition(message), None)
        return False

    def parked(self, message: Message) -> None:
        self._parked[_partition(message)] += 1


def _partition(message: Message) -> object:
    origin = message.origin
    return (origin["topic"], origin["partition"]) if "partition" in origin else None


class _Picking:
    """How many parked messages to pick, by how long the last ones took: none should lose its lease."""

    def __init__(self) -> None:
        self.count = PICK
        self.any = False
        self._began = 0.0

    def begin(self, found: Found | Release) -> None:
        self.any = self.any or (isinstance(found, Found) and bool(found.jobs))
        self._began = time.monotonic()

    def end(self) -> None:
        self.count = PICK if time.monotonic() - self._began < LEASE / 10 else 1


class Lane:
    """For sync handlers, in a thread."""

    def __init__(self, worker: ConsumerWorker, engine: Engine) -> None:
        feed = worker.feed
        self._worker = worker
        self._unit = SyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger)
        self._picking = _Picking()

    def run(self, item: Item | Look) -> None:
        try:
            if isinstance(item, Item):
                self._one(item)
            else:
                self._look()
        except BaseException as error:
            self._worker.crash = error
            raise

    def _one(self, item: Item) -> None:
        job = self._worker.take(item)
        if job is not None:
            self._worker.settle(item, self._unit.run(job))

    def _look(self) -> None:
        worker, picking = self._worker, self._picking
        found = self._unit.look(worker.owner, picking.count, **worker.how())
        picking.begin(found)
        items = worker.looked(found)
        for each in items:
            self._one(each)
        picking.end()
        worker.look_again(bool(items))

    def close(self) -> None:
        if self._picking.any:
            with suppress(Exception):  # the database is away: the lease ends
                self._unit.lease(self._worker.owner)
        self._unit.close()


class AsyncLane:
    """For async handlers, in a task of the handlers' event loop."""

    def __init__(self, worker: ConsumerWorker, engine: AsyncEngine) -> None:
        feed = worker.feed
        self._worker = worker
        self._unit = AsyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger, apart=True)
        self._picking = _Picking()

    async def run(self, item: Item | Look) -> None:
        try:
            if isinstance(item, Item):
                await self._one(item)
            else:
                await self._look()
        except BaseException as error:
            self._worker.crash = error
            raise

    async def _one(self, item: Item) -> None:
        job = self._worker.take(item)
        if job is not None:
            self._worker.settle(item, await self._unit.run(job))

    async def _look(self) -> None:
        worker, picking = self._worker, self._picking
        found = await self._unit.look(worker.owner, picking.count, **worker.how())
        picking.begin(found)
        items = worker.looked(found)
        for each in items:
            await self._one(each)
        picking.end()
        worker.look_again(bool(items))

    async def close(self) -> None:
        if self._picking.any:
            with suppress(Exception):  # the database is away: the lease ends
                await self._unit.lease(self._worker.owner)
        await self._unit.close()
