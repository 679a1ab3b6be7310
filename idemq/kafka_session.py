"""The life of one aiokafka consumer: fetch, hand out, commit, watch; until it is closed or does not work.

Within it an epoch is one assignment of a partition, and has a `Tracker`. The partitions to read from are
named in every fetch, because aiokafka forgets what it was told to pause at the next rebalance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from time import monotonic
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    GroupAuthorizationFailedError,
    IllegalStateError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
    KafkaError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
)

from idemq.broker import Deliver
from idemq.errors import IdemqError, SetupError
from idemq.kafka_connect import log, missing, reach, told
from idemq.kafka_delivery import Flow, KafkaDelivery
from idemq.kafka_records import message_from, reread
from idemq.offsets import Tracker

#: Records of one partition that may be delivered and not yet committed; then it waits for the oldest.
CAP = 1_000
#: Commit at least so often when something is finished.
COMMIT_INTERVAL = 0.2
#: aiokafka repeats a commit for ever; after this long the consumer is built anew.
COMMIT_SECONDS = 10.0
#: How long one fetch waits for records. Not a limit: during a rebalance aiokafka waits on.
FETCH_MILLISECONDS = 200
#: Only aiokafka's own clock for idle consumers reads this; ours is the watchdog, so it must never fire.
NEVER_MILLISECONDS = 2**31 - 1
#: Errors after which trying again is pointless until somebody changes something.
_FOR_GOOD = (
    GroupAuthorizationFailedError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
)


class Stuck(IdemqError):
    """The consumer makes no progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is read, by whom, and how long things may take."""

    broker: str
    topic: str
    group: str
    description: str
    options: Mapping[str, Any] = field(repr=False)  # holds the password
    session_timeout: float
    rebalance_timeout: float
    stuck_after: float


class Session(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped for mypy here
    """One consumer, from its building to its end."""

    def __init__(self, reading: Reading, deliver: Deliver, flow: Flow, closing: Event) -> None:
        self.joined = False
        self.sign_of_life = float("-inf")
        self._reading = reading
        self._deliver = deliver
        self._flow = flow
        self._closing = closing
        self._trackers: dict[TopicPartition, Tracker] = {}
        self._began = self._turn = self._tails_seen = monotonic()
        self._moves: dict[TopicPartition, tuple[int, float]] = {}
        self._broken: Exception | None = None

    async def run(self, remaining: Callable[[], float]) -> None:
        """Returns when the subscription is closed; raises when the consumer must be built anew."""
        self._settled, self._finished, self._closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._committing = asyncio.Lock()
        await reach(dict(self._reading.options))
        self._consumer = self._build()
        orderly = False
        try:
            await self._start()
            await self._work()
            orderly = True
        except _FOR_GOOD as error:
            raise SetupError(f"{self._reading.description}: {told(error)}") from None
        finally:
            await self._leave(remaining, orderly)

    def _build(self) -> AIOKafkaConsumer:
        reading = self._reading
        session = int(reading.session_timeout * 1000)
        return AIOKafkaConsumer(
            **reading.options,
            group_id=reading.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=session,
            heartbeat_interval_ms=min(3_000, session // 3),
            rebalance_timeout_ms=int(reading.rebalance_timeout * 1000),
            max_poll_interval_ms=NEVER_MILLISECONDS,
        )

    async def _start(self) -> None:
        """Connect and subscribe; the group is joined in the background."""
        async with asyncio.timeout(self._reading.stuck_after):
            await self._consumer.start()
            # Asked for all topics the broker creates none; subscribing to a missing one may create it.
            if self._reading.topic not in await self._consumer.topics():
                raise missing(self._reading.description)
        self._consumer.subscribe([self._reading.topic], listener=self)

    async def _work(self) -> None:
        tasks = [
            asyncio.create_task(self._fetch(), name="the fetch loop"),
            asyncio.create_task(self._commits(), name="the commit loop"),
            asyncio.create_task(self._watch(), name="the watchdog"),
            asyncio.create_task(self._until_closed(), name="the wait for the end"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.cancelled():
                    raise Stuck(f"{self._reading.description}: {task.get_name()} was cancelled")
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)

    async def _until_closed(self) -> None:
        while not self._closing.is_set():
            await _within(self._closed, 1.0)

    def wake(self) -> None:
        """On the loop's thread: there is room again, much to commit, or the end."""
        self._settled.set()
        self._finished.set()
        if self._closing.is_set():
            self._closed.set()

    # ---- reading

    async def _fetch(self) -> None:
        while True:
            self._turn = monotonic()
            partitions, limit = self._readable()
            if not limit:
                await _within(self._settled, 0.05)
                continue
            try:
                found = await self._consumer.getmany(
                    *partitions, timeout_ms=FETCH_MILLISECONDS, max_records=limit
                )
            except (CorruptRecordException, UnicodeDecodeError) as error:
                found = await self._get_past(error, partitions, limit)
            self._hand_out(found)
            await self._see_tails()

    def _readable(self) -> tuple[Sequence[TopicPartition], int]:
        """The partitions to read from (none: whichever will be assigned) and how many records at most."""
        room = self._flow.room()
        assigned = self._consumer.assignment()
        if not assigned:
            return (), min(room, CAP)
        left = {partition: CAP - self._tracker(partition).uncommitted for partition in assigned}
        open_ = {partition: records for partition, records in left.items() if records > 0}
        return tuple(open_), min(room, *open_.values()) if open_ else 0

    def _tracker(self, partition: TopicPartition) -> Tracker:
        """The partition's epoch. Records can come before the listener hears of the assignment."""
        return self._trackers.setdefault(partition, Tracker())

    def _hand_out(self, found: Mapping[TopicPartition, Sequence[Any]]) -> None:
        if not self._flow.hand_out(sum(map(len, found.values()))):
            for partition, records in found.items():
                self._consumer.seek(partition, records[0].offset)
            return
        deliveries = []
        for partition, records in found.items():
            tracker = self._tracker(partition)
            if tracker.next_offset is not None and records[0].offset < tracker.next_offset:
                tracker.end()  # the topic was deleted and made anew
                tracker = self._trackers[partition] = Tracker()
            tracker.delivered([record.offset for record in records])
            deliveries += [
                KafkaDelivery(message_from(record, self._reading.broker), tracker, record.offset, self._flow)
                for record in records
            ]
        if deliveries:
            self.sign_of_life = monotonic()
            try:
                self._deliver(deliveries)
            except BaseException:
                for delivery in deliveries:
                    delivery.drop()
                raise

    async def _get_past(
        self, error: Exception, partitions: Sequence[TopicPartition], limit: int
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        """The records at the place where aiokafka's decoder failed, read leniently.

        The failed fetch may have moved positions past records that it then lost, so all are set back first.
        """
        log.debug("%s: %s", self._reading.description, told(error))
        epochs = dict(self._trackers)
        for partition in partitions or self._consumer.assignment():
            await self._set_back(partition)
        for partition in partitions or self._consumer.assignment():
            position = await self._consumer.position(partition)
            records, after = await reread(self._consumer, partition, position, limit)
            if records and self._trackers.get(partition) is epochs.get(partition):
                self._consumer.seek(partition, after)
                return {partition: records}
        raise error

    async def _set_back(self, partition: TopicPartition) -> None:
        tracker = self._tracker(partition)
        position = tracker.next_offset
        if position is None:
            position = await self._consumer.committed(partition)
        if position is None:
            await self._consumer.seek_to_beginning(partition)
        elif self._trackers.get(partition) is tracker:
            self._consumer.seek(partition, position)

    async def _see_tails(self) -> None:
        """Pass what holds no records for us: control records, aborted transactions, compacted offsets.

        Right only here: nothing else reads, so what the positions have passed is in the trackers.
        """
        if monotonic() - self._tails_seen < COMMIT_INTERVAL:
            return
        self._tails_seen = monotonic()
        for partition, tracker in list(self._trackers.items()):
            if tracker.unfinished:
                continue
            position = await self._position(partition)
            if position is not None and self._trackers.get(partition) is tracker:
                tracker.skipped_to(position)

    async def _position(self, partition: TopicPartition) -> int | None:
        """Where the partition is read next; None while aiokafka does not know."""
        try:
            async with asyncio.timeout(0.2):
                return int(await self._consumer.position(partition))
        except (TimeoutError, IllegalStateError):
            return None

    # ---- committing

    async def _commits(self) -> None:
        while True:
            await _within(self._finished, COMMIT_INTERVAL)
            self._flow.committing()
            await self._commit()

    async def _commit(self, metadata: str = "") -> None:
        """Commit what is finished, one commit at a time. The group's refusal only announces a rebalance."""
        async with self._committing:
            offsets = {
                partition: (position, metadata)
                for partition, tracker in self._trackers.items()
                if (position := tracker.committable()) is not None
            }
            if not offsets:
                return
            trackers = {partition: self._trackers[partition] for partition in offsets}
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    await self._consumer.commit(offsets)
            except (CommitFailedError, IllegalStateError) as error:
                log.debug("%s: %s", self._reading.description, told(error))
                return
            except TimeoutError:
                raise Stuck(
                    f"{self._reading.description}: a commit got no answer in {COMMIT_SECONDS} s"
                ) from None
            for partition, (position, _) in offsets.items():
                trackers[partition].committed(position)

    # ---- assignments

    async def on_partitions_revoked(self, revoked: object) -> None:
        """All partitions, whatever is named: aiokafka knows only the eager protocol."""
        try:
            async with asyncio.timeout(0.9 * self._reading.rebalance_timeout):
                await self._drain(0.6 * self._reading.rebalance_timeout)
                await self._commit()
        except Exception as error:  # aiokafka would log it and go on
            self._broken = error
        finally:
            self._end_epochs()

    async def _drain(self, seconds: float) -> None:
        """Let nothing more be started, and wait a while for what is."""
        until = monotonic() + seconds
        for tracker in self._trackers.values():
            tracker.stop_starting()
        while monotonic() < until and not self._closing.is_set():
            if not any(tracker.running for tracker in self._trackers.values()):
                return
            await asyncio.sleep(0.01)

    def _end_epochs(self) -> None:
        for tracker in self._trackers.values():
            tracker.end()
        self._trackers.clear()
        self._moves.clear()

    def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        for partition in assigned:
            self._tracker(partition)
        self.joined = self._flow.ever_joined = True
        self.sign_of_life = monotonic()

    # ---- watching

    async def _watch(self) -> None:
        """Raise when the consumer is broken or makes no progress: aiokafka does not always notice."""
        interval = min(3.0, self._reading.session_timeout / 3)
        while True:
            await asyncio.sleep(interval)
            # Private, but otherwise errors are told only to one who fetches, and at times nobody does.
            self._consumer._coordinator.check_errors()
            if self._broken is not None:
                raise self._broken
            if monotonic() - self._turn > self._reading.stuck_after:
                raise Stuck(f"{self._reading.description}: no progress for {self._reading.stuck_after} s")
            await self._probe(interval)

    async def _probe(self, seconds: float) -> None:
        """Ask for the ends of our partitions: a sign of life, and whether records lie there unread."""
        partitions = self._consumer.assignment()
        try:
            async with asyncio.timeout(seconds):
                ends = await self._consumer.end_offsets(partitions)
        except (KafkaError, TimeoutError):
            if monotonic() - max(self.sign_of_life, self._began) > self._reading.stuck_after:
                raise Stuck(f"{self._reading.description}: the cluster does not answer") from None
            return
        if self.joined:
            self.sign_of_life = monotonic()
        open_, room = self._readable()
        for partition, end in ends.items():
            position = await self._position(partition)
            if position is not None:
                waits = not room or partition not in open_ or position >= end
                self._see_move(partition, position, waits)

    def _see_move(self, partition: TopicPartition, position: int, waits: bool) -> None:
        before, since = self._moves.get(partition, (None, 0.0))
        if waits or position != before:
            self._moves[partition] = (position, monotonic())
        elif monotonic() - since > self._reading.stuck_after:
            raise Stuck(
                f"{self._reading.description}: records of partition {partition.partition} do not come"
            )

    # ---- the end

    async def _leave(self, remaining: Callable[[], float], orderly: bool) -> None:
        """Commit what is finished, if all is well, and leave the group; in bounded time."""
        if orderly:
            await self._tried(self._commit(), remaining() / 2)
        self._end_epochs()
        if not await self._tried(self._consumer.stop(), remaining()):
            # stop() closes the connections last, so they are still open.
            await self._tried(self._consumer._client.close(), 1.0)

    async def _tried(self, work: Coroutine[Any, Any, None], seconds: float) -> bool:
        """Whether `work` ended well. A task of its own, because aiokafka's stop() can raise a CancelledError
        of its own making, which is not ours to obey."""
        task = asyncio.create_task(work)
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            task.cancel()
            return False
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.debug("%s: %s", self._reading.description, told(error))
        return not task.cancelled() and error is None


async def _within(event: asyncio.Event, seconds: float) -> None:
    """Wait for `event`, at most so long, and clear it.

    Not with `wait_for`: before Python 3.12 it forgets a cancellation that comes together with the event.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
