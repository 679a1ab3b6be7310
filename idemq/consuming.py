"""One consumer in one process: its deliveries and its parked messages, run by lanes, settled by the verdict.

Nothing is acknowledged but on `Ack`, `Dead` and `Parked`. On `Release` the worker keeps the delivery and
tries again after a delay, because a broker's own requeue is a hot loop (RabbitMQ) or does not exist (Kafka).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idemq.bridge import Clock, EventLoop, Tasks, Threads
from idemq.broker import Delivery, Subscription
from idemq.copies import Copies
from idemq.failures import FAILED, JUDGED_BAD, RELEASED, SUSPECT, Job, Outcome
from idemq.lanes import AsyncLane, Feed, Isolation, Item, Kept, Lane, Look, Suspicion
from idemq.message import Ack, Dead, Parked, Release, Verdict
from idemq.ordering import Keys
from idemq.outage import Outage
from idemq.overtime import Timed
from idemq.packing import shown
from idemq.parking import KEEP, LEASE, LOOK_EVERY, Found
from idemq.retry import pause

log = logging.getLogger("idemq.worker")

#: So many messages in a row that cannot be judged stop the consumer: its producer is wrong, not its messages.
UNJUDGED = 20


class ConsumerWorker:
    """Runs one consumer in this process."""

    def __init__(
        self,
        feed: Feed,
        engine: Engine | AsyncEngine,
        clock: Clock,
        loop: EventLoop | None,
        isolation: Isolation | None,
        planned: Callable[[], None],
    ) -> None:
        self.feed = feed
        self.name = feed.consumer.name
        self.counts: Counter[str] = Counter()
        #: What ended a lane: a bug, or an exception that no handler may raise. The process must not go on.
        self.crash: BaseException | None = None
        #: Why this consumer stopped by itself.
        self.stopped: str | None = None
        self._leaver: threading.Thread | None = None
        #: Marks the parked messages that this worker has picked.
        self.owner = uuid4().bytes
        self._isolation, self._planned = isolation, planned
        self._clock = clock
        self._lock = threading.Lock()
        self._stopping, self._told = False, float("-inf")
        self._unjudged = self._looks = 0
        self._copies = Copies()
        self._kept: set[Item] = set()  # their twins are in flight elsewhere
        self._outage = Outage()
        self._keys = Keys(feed.consumer.lane if feed.consumer.ordered else None)
        self._timed = Timed(self.name)
        self._suspicion = Suspicion(feed.concurrency, feed.prefetch)
        if isinstance(engine, AsyncEngine):
            assert loop is not None
            self._lanes: Threads[Item | Look] | Tasks[Item | Look] = Tasks(
                loop, feed.concurrency, lambda: AsyncLane(self, engine)
            )
        else:
            self._lanes = Threads(self.name, feed.concurrency, lambda: Lane(self, engine))
        self.subscription: Subscription = feed.source.subscribe(self.name, self._deliver, feed.prefetch)
        clock.later(0.0, self._tick)

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        self._lanes.put(self._keys.admit([Item(delivery) for delivery in deliveries]))

    def take(self, item: Item) -> Job | None:
        """The job to attempt now, or None when this is not the time or not our message any more."""
        if self._stopping or not item.delivery.start():
            item.delivery.drop()
            self._lanes.put(self._outage.over(item, answered=False) + self._freed(item))
            return None
        if item.job is None:
            message, consumer = item.delivery.message, self.feed.consumer
            item.job = (consumer.suspect if self._suspicion.of(message) else consumer.job)(message)
        # In this order: a copy that asked for the database would wait for the first one, and that for it.
        if self._copies.waits(item) or self._outage.holds(item):
            item.delivery.rest()
            return None
        if self.feed.consumer.deadline is not None:
            self._timed.begin(item)
        return item.job

    def settle(self, item: Item, verdict: Verdict) -> None:
        """Act on the verdict, then let what waited for this one go on."""
        if self.feed.consumer.deadline is not None:
            self._timed.end(item)  # first: what is released may begin anew at once
        outcome = self._act(item, verdict)
        with self._lock:
            self.counts[outcome] += 1
        if not isinstance(verdict, Release) and (freed := self._freed(item)):
            self._lanes.put(freed)

    def _freed(self, item: Item) -> list[Item]:
        """What waited for `item`, which is settled, or not ours any more."""
        self._kept.discard(item)
        return self._copies.settled(item) + self._keys.settled(item)

    def _act(self, item: Item, verdict: Verdict) -> str:
        if not (isinstance(verdict, Release) and verdict.outage):
            self._database_answers(item)
        match verdict:
            case Ack(duplicate):
                item.delivery.ack()
                self._unjudged = 0
                if self.feed.consumer.handler.plans:
                    self._planned()
                return "duplicates" if duplicate else "processed"
            case Dead(reason):
                item.delivery.ack()
                self._buried(item, reason)
                return "dead"
            case Parked(reason, delay, cause):
                item.delivery.ack()
                self._unjudged = 0
                if reason == SUSPECT:
                    self._suspicion.parked(item.delivery.message)
                level = logging.WARNING if reason == FAILED else logging.INFO
                why = f" ({shown(cause)})" if cause else ""
                log.log(level, "%s: %r parked: %s%s; due in %.0f s", self.name, item.id, reason, why, delay)
                return "failures" if reason == FAILED else "parked"
            case Release(stop=True):
                item.delivery.drop()
                self._stop_consuming(verdict.cause)
                return "released"
            case Release(outage=True):
                self._database_away(item, verdict.cause)
                return "released"
        self._keep(item, verdict)
        return "failures" if verdict.failed else "released"

    def _buried(self, item: Item, reason: str) -> None:
        outcome = item.job.outcome if item.job is not None else None
        why = f" ({shown(outcome.cause or str(outcome.error))})" if outcome and outcome.error else ""
        log.warning("%s: dead letter (%s)%s: %r", self.name, reason, why, item.id)
        if reason not in JUDGED_BAD or isinstance(item.delivery, Kept):
            self._unjudged = 0
            return
        self._unjudged += 1
        if self._unjudged >= UNJUDGED:
            self._stop_consuming(
                f"{UNJUDGED} messages in a row cannot be judged; the last one: {reason}{why}"
            )

    def _keep(self, item: Item, verdict: Release) -> None:
        item.delivery.rest()
        item.releases += 1
        delay = verdict.delay if verdict.delay is not None else pause(item.releases)
        if verdict.twin and item.job is not None:
            now = time.monotonic()
            with self._lock:
                self._kept.add(item)
                many = len(self._kept) >= max(2, self.feed.prefetch // 2)
            item.kept_since = item.kept_since or now
            if many or now - item.kept_since > KEEP or item.job.row is not None:
                item.job.outcome, delay = Outcome(RELEASED, None, KEEP, verdict.cause), 0.1
        if verdict.failed or self._may_tell():
            log.warning(
                "%s: %r not done (%s); tried again in %.1f s",
                self.name,
                item.id,
                shown(verdict.cause),
                delay,
            )
        self._clock.later(delay, lambda: self._lanes.put([item]))

    def _database_away(self, item: Item, cause: str) -> None:
        item.delivery.rest()
        found = self._outage.found(item)
        if found is not None:
            rest, trying = found
            log.warning(
                "%s: the database is away (%s); consuming rests %.1f s", self.name, shown(cause), rest
            )
            self._clock.later(rest, lambda: self._lanes.put([trying]))

    def _database_answers(self, item: Item) -> None:
        if self._outage.lasts:
            log.info("%s: the database answers again", self.name)
            self._lanes.put(self._outage.over(item, answered=True))

    def _tick(self) -> None:
        """Look for parked messages that are due."""
        if self._stopping:
            return
        self._clock.later(LOOK_EVERY, self._tick)
        with self._lock:
            if self._outage.lasts or self._looks >= self.feed.concurrency:
                return
            self._looks += 1
        self._lanes.put([Look()])

    def how(self) -> dict[str, Any]:
        """How to look for parked messages."""
        return {
            "inline": self._isolation is None,
            # Leases that ended while the database was away tell nothing of their owners.
            "reap": self._outage.answering_for > LEASE,
            "ended": self._isolation.ended(self.name) if self._isolation is not None else None,
        }

    def looked(self, found: Found | Release) -> list[Item]:
        """What to run now of what a look found."""
        if isinstance(found, Release):
            if self._may_tell():
                log.warning("%s: parked messages wait: %s", self.name, shown(found.cause))
            if found.outage:
                self._outage.noticed()
            return []
        if found.suspects and self._isolation is not None:
            self._isolation.start(self.name)
        return [Item(Kept(job.message), job) for job in found.jobs]

    def look_again(self, more: bool) -> None:
        """After a look and what it found: at once when there may be more."""
        if more and not self._stopping:
            self._lanes.put([Look()])
            return
        with self._lock:
            self._looks -= 1

    def _stop_consuming(self, why: str) -> None:
        with self._lock:
            if self.stopped is not None:
                return
            self.stopped = why
        log.error("%s: stopped: %s. What is not settled stays with the broker", self.name, why)
        self._leaver = threading.Thread(target=self._leave, name=f"idemq-{self.name}-leaves", daemon=True)
        self._leaver.start()

    def _leave(self) -> None:
        self.pause()
        self._end(30.0)

    def _may_tell(self) -> bool:
        """Once a second: what the database does befalls every message alike, while it is down."""
        with self._lock:
            may = time.monotonic() >= self._told + 1.0
            self._told = time.monotonic() if may else self._told
            return may

    def trouble(self) -> BaseException | None:
        """Why the process cannot go on, if it cannot."""
        trouble = self.crash or self._timed.late()
        if self.stopped is not None:
            return trouble
        lost = RuntimeError("a lane was cancelled from outside") if self._lanes.ended() else None
        return trouble or self.subscription.failure or lost

    def report(self) -> None:
        """One line of what happened since the start."""
        names = ("processed", "duplicates", "parked", "dead", "failures")
        counts = ", ".join(f"{name} {self.counts[name]}" for name in names)
        state = "" if self._stopping or self.subscription.connected else "; not connected to the broker"
        state += "; waiting for the database" if self._outage.lasts else ""
        state += f"; stopped: {self.stopped}" if self.stopped is not None else ""
        log.info("%s: %s%s", self.name, counts, state)

    def pause(self) -> None:
        """Take no more deliveries, and begin no more attempts."""
        if self._stopping:
            return
        self._stopping = True
        self.subscription.pause()
        self._lanes.stop(lambda item: item.delivery.drop() if isinstance(item, Item) else None)
        for item in self._keys.clear():
            item.delivery.drop()

    def close(self, grace: float) -> bool:
        """Wait for the attempts under way, settle, and leave. False: an attempt did not end in time."""
        if self._leaver is not None:
            self._leaver.join(grace)
            return not self._leaver.is_alive()
        return self._end(grace)

    def _end(self, grace: float) -> bool:
        ended = self._lanes.join(grace)
        self.report()
        self.subscription.close(timeout=10.0)
        return ended
