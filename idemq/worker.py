"""The worker: takes deliveries from brokers, runs each by the one path, and settles it by the verdict.

Nothing is acknowledged but on `Ack` and `Dead`. On `Release` the worker keeps the delivery and tries again
after a growing delay, because a broker's own requeue is a hot loop (RabbitMQ) or does not exist (Kafka).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import RetryCallState, Retrying

from idemq.attempts import PAUSE, AsyncUnit, SyncUnit
from idemq.bridge import Clock, EventLoop, Tasks, Threads
from idemq.broker import Delivery, Source, Subscription
from idemq.failures import Job
from idemq.message import Ack, Dead, Release, Verdict
from idemq.process import Consumer

log = logging.getLogger("idemq.worker")

#: Seconds between two lines about a consumer's progress.
REPORT_EVERY = 60.0

#: Seconds that the database has for closing idle connections when the worker stops.
FAREWELL = 5.0


@dataclass(slots=True, eq=False)
class Item:
    """A delivery that the worker has, until it is settled."""

    delivery: Delivery
    job: Job | None = None
    releases: int = 0


@dataclass(frozen=True, slots=True)
class Feed:
    """What a consumer is run with: its declaration, where from, and how many at a time."""

    consumer: Consumer
    source: Source
    concurrency: int
    prefetch: int
    number: int
    trigger: bool = False


class ConsumerWorker:
    """Runs one consumer in this process."""

    def __init__(
        self, feed: Feed, engine: Engine | AsyncEngine, clock: Clock, loop: EventLoop | None
    ) -> None:
        self.feed = feed
        self.counts: Counter[str] = Counter()
        #: What ended a lane: a bug, or an exception that no handler may raise. The process must not go on.
        self.crash: BaseException | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._stopping = False
        self._told = float("-inf")
        #: Keys being worked on here, each with the copies that wait for it: they never reach the database.
        self._in_flight: dict[bytes, list[Item]] = {}
        name = feed.consumer.name
        if isinstance(engine, AsyncEngine):
            assert loop is not None
            self._lanes: Threads[Item] | Tasks[Item] = Tasks(
                loop, feed.concurrency, lambda: _AsyncLane(self, engine)
            )
        else:
            self._lanes = Threads(name, feed.concurrency, lambda: _Lane(self, engine))
        self.subscription: Subscription = feed.source.subscribe(name, self._deliver, feed.prefetch)

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        self._lanes.put([Item(delivery) for delivery in deliveries])

    def take(self, item: Item) -> Job | None:
        """The job to attempt now, or None when this is not the time or not our message any more."""
        if self._stopping or not item.delivery.start():
            item.delivery.drop()
            return None
        if item.job is None:
            item.job = self.feed.consumer.job(item.delivery.message)
        key = item.job.key
        if key is not None:
            with self._lock:
                if (waiting := self._in_flight.get(key)) is not None:
                    item.delivery.rest()
                    waiting.append(item)
                    return None
                self._in_flight[key] = []
        return item.job

    def settle(self, item: Item, verdict: Verdict) -> None:
        """Act on the verdict, then let the copies that waited for this one go on."""
        match verdict:
            case Ack(duplicate):
                item.delivery.ack()
                outcome = "duplicates" if duplicate else "processed"
            case Dead(reason):
                item.delivery.ack()
                outcome = "dead"
                why = f" ({shown(str(item.job.bad))})" if item.job is not None and item.job.bad else ""
                log.warning("%s: dead letter (%s)%s: %r", self.feed.consumer.name, reason, why, _id(item))
            case Release():
                outcome = "failures" if verdict.failed else "released"
                self._keep(item, verdict)
        key = item.job.key if item.job is not None else None
        with self._lock:
            self.counts[outcome] += 1
            waiting = self._in_flight.pop(key, []) if key is not None else []
        if waiting:
            self._lanes.put(waiting)

    def _keep(self, item: Item, verdict: Release) -> None:
        item.delivery.rest()
        item.releases += 1
        delay = _pause(item.releases)
        if verdict.failed or self._may_tell():
            log.warning(
                "%s: %r not done (%s); tried again in %.1f s",
                self.feed.consumer.name,
                _id(item),
                shown(verdict.cause),
                delay,
            )
        self._clock.later(delay, lambda: self._lanes.put([item]))

    def _may_tell(self) -> bool:
        """Once a second: what the database does befalls every message alike, while it is down."""
        with self._lock:
            now = time.monotonic()
            if now < self._told + 1.0:
                return False
            self._told = now
            return True

    def lane_lost(self) -> Exception | None:
        return RuntimeError("a lane was cancelled from outside") if self._lanes.ended() else None

    def report(self) -> None:
        """One line of what happened since the start."""
        counts = ", ".join(
            f"{name} {self.counts[name]}" for name in ("processed", "duplicates", "dead", "failures")
        )
        away = not (self._stopping or self.subscription.connected)
        connected = "; not connected to the broker" if away else ""
        log.info("%s: %s%s", self.feed.consumer.name, counts, connected)

    def pause(self) -> None:
        """Take no more deliveries, and begin no more attempts."""
        self._stopping = True
        self.subscription.pause()
        self._lanes.stop(lambda item: item.delivery.drop())

    def close(self, grace: float) -> bool:
        """Wait for the attempts under way, settle, and leave. False: an attempt did not end in time."""
        ended = self._lanes.join(grace)
        self.report()
        self.subscription.close(timeout=10.0)
        return ended


class _Lane:
    def __init__(self, worker: ConsumerWorker, engine: Engine) -> None:
        feed = worker.feed
        self._worker = worker
        self._unit = SyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger)

    def run(self, item: Item) -> None:
        try:
            job = self._worker.take(item)
            if job is not None:
                self._worker.settle(item, self._unit.run(job))
        except BaseException as error:
            self._worker.crash = error
            raise

    def close(self) -> None:
        self._unit.close()


class _AsyncLane:
    def __init__(self, worker: ConsumerWorker, engine: AsyncEngine) -> None:
        feed = worker.feed
        self._worker = worker
        self._unit = AsyncUnit(engine, feed.consumer, feed.number, trigger=feed.trigger)

    async def run(self, item: Item) -> None:
        try:
            job = self._worker.take(item)
            if job is not None:
                self._worker.settle(item, await self._attempt(job))
        except BaseException as error:
            self._worker.crash = error
            raise

    async def _attempt(self, job: Job) -> Verdict:
        # In a task of its own: what a handler does to its task, at once or by a timer that it forgot, must
        # reach neither this lane nor the next message.
        attempt = asyncio.ensure_future(self._unit.run(job))
        await asyncio.wait({attempt})
        if attempt.cancelled():  # only the handler can have done that
            return Release("CancelledError: the handler's task was cancelled", failed=True)
        return attempt.result()

    async def close(self) -> None:
        await self._unit.close()


class Worker:
    """All consumers of one process, from start to stop."""

    def __init__(self, feeds: Sequence[tuple[Feed, Engine | AsyncEngine]]) -> None:
        self._feeds = feeds
        self._clock = Clock()
        self.failure: BaseException | None = None
        #: Those that run, once `run` was called.
        self.consumers: list[ConsumerWorker] = []

    def stop(self) -> None:
        """Stop in order; may be called from a signal handler or another thread."""
        self._clock.stop()

    def run(self, grace: float, started: Callable[[], None] = lambda: None) -> bool:
        """Run until `stop`, or until a consumer cannot go on (`failure`).

        True: everything that was begun is settled. False: an attempt did not end within `grace` seconds;
        the caller must end the process hard, which is safe.
        """
        loop = EventLoop() if any(isinstance(engine, AsyncEngine) for _, engine in self._feeds) else None
        workers = [ConsumerWorker(feed, engine, self._clock, loop) for feed, engine in self._feeds]
        self.consumers = workers
        self._clock.later(1.0, self._watch)
        self._clock.later(REPORT_EVERY, self._report)
        started()
        self._clock.run()
        log.info("stopping: finishing what was begun (at most %.0f s)", grace)
        for worker in workers:
            worker.pause()
        end = time.monotonic() + grace
        late = [worker for worker in workers if not worker.close(max(0.0, end - time.monotonic()))]
        if loop is not None and not late:
            for _, engine in self._feeds:
                if isinstance(engine, AsyncEngine):
                    loop.run(_dispose(engine))  # its connections belong to this loop
            loop.close()
        return not late

    def _watch(self) -> None:
        for worker in self.consumers:
            self.failure = worker.crash or worker.subscription.failure or worker.lane_lost()
            if self.failure is not None:
                log.error("%s: cannot go on: %s", worker.feed.consumer.name, self.failure)
                self._clock.stop()
                return
        self._clock.later(1.0, self._watch)

    def _report(self) -> None:
        for worker in self.consumers:
            worker.report()
        self._clock.later(REPORT_EVERY, self._report)


async def _dispose(engine: AsyncEngine) -> None:
    """Say good-bye to the database, if it listens: some drivers wait for its answer without a limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(FAREWELL):
            await engine.dispose()


def _pause(releases: int) -> float:
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = releases
    return PAUSE(state)


def _id(item: Item) -> str:
    return shown(item.job.message.id or "" if item.job is not None else "")


def shown(text: str) -> str:
    """Text from outside as it may stand in a log line: one line, printable, at most 200 characters."""
    text = "".join(each if each.isprintable() else " " for each in text[:400])
    return text if len(text) <= 200 else text[:200] + "..."
