"""The life of one aiokafka consumer: fetch, hand out, commit, watch; until it is closed or does not work.

The partitions to read from are named in every fetch, because aiokafka forgets what it was told to pause at
the next rebalance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from threading import Event
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    CorruptRecordException,
    GroupAuthorizationFailedError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
    UnsupportedCodecError,
)

from idemq.broker import Deliver
from idemq.errors import SetupError
from idemq.kafka_connect import Reading, Stuck, log, missing, reach, told
from idemq.kafka_delivery import Flow, KafkaDelivery
from idemq.kafka_epochs import Epochs
from idemq.kafka_records import message_from, reread
from idemq.kafka_watch import Watchdog
from idemq.offsets import CAP, Tracker

#: Commit at least so often when something is finished.
COMMIT_INTERVAL = 0.2
#: How long one fetch waits for records. Not a limit: during a rebalance aiokafka waits on.
FETCH_MILLISECONDS = 200
#: Only aiokafka's own clock for idle consumers reads this; ours is the watchdog, so it must never fire.
NEVER_MILLISECONDS = 2**31 - 1
#: Errors after which trying again is pointless until somebody changes something, and what that is.
_FOR_GOOD = {
    GroupAuthorizationFailedError: "allow this user to read in the group",
    InvalidGroupIdError: "choose another group=...",
    InvalidSessionTimeoutError: "choose a session_timeout=... that the broker allows (6 s and more)",
    RecordTooLargeError: "the server is too old to send a record above the fetch size",
    TopicAuthorizationFailedError: "allow this user to read the topic",
    UnsupportedCodecError: "install the compression library that it names",
}


class Session:
    """One consumer, from its building to its end."""

    def __init__(self, reading: Reading, deliver: Deliver, flow: Flow, closing: Event) -> None:
        self._reading = reading
        self._deliver = deliver
        self._flow = flow
        self._closing = closing
        self._settled, self._finished, self._closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._watchdog: Watchdog | None = None
        self._epochs: Epochs | None = None

    @property
    def connected(self) -> bool:
        return self._watchdog is not None and self._watchdog.connected

    @property
    def joined(self) -> bool:
        """It was in the group at least once."""
        return self._epochs is not None and self._epochs.joined_at is not None

    async def run(self, remaining: Callable[[], float]) -> None:
        """Returns when the subscription is closed; raises when the consumer must be built anew."""
        await reach(dict(self._reading.options))
        self._consumer = self._build()
        epochs = self._epochs = Epochs(
            self._consumer, self._reading, self._closing, assigned=self._finished.set
        )
        watchdog = self._watchdog = Watchdog(self._consumer, self._reading, epochs, self._readable)
        orderly = False
        try:
            await self._start(epochs)
            await self._work(epochs, watchdog)
            orderly = True
        except tuple(_FOR_GOOD) as error:
            remedy = _FOR_GOOD[type(error)]
            raise SetupError(f"{self._reading.description}: {told(error)}; {remedy}") from None
        finally:
            await self._leave(epochs, remaining, orderly)

    def _build(self) -> AIOKafkaConsumer:
        reading = self._reading
        session, rebalance = int(reading.session_timeout * 1000), int(reading.rebalance_timeout * 1000)
        return AIOKafkaConsumer(
            **reading.options,
            group_id=reading.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=session,
            # A rebalance is learned of by a heartbeat, and time must be left for what is under way.
            heartbeat_interval_ms=min(3_000, session // 3, rebalance // 4),
            rebalance_timeout_ms=rebalance,
            max_poll_interval_ms=NEVER_MILLISECONDS,
        )

    async def _start(self, epochs: Epochs) -> None:
        """Connect and subscribe; the group is joined in the background."""
        async with asyncio.timeout(self._reading.stuck_after):
            await self._consumer.start()
            # Asked for all topics the broker creates none; subscribing to a missing one may create it.
            if self._reading.topic not in await self._consumer.topics():
                raise missing(self._reading.description)
        self._consumer.subscribe([self._reading.topic], listener=epochs)

    async def _work(self, epochs: Epochs, watchdog: Watchdog) -> None:
        tasks = [
            asyncio.create_task(self._fetch(epochs, watchdog), name="the fetch loop"),
            asyncio.create_task(self._commits(epochs), name="the commit loop"),
            asyncio.create_task(watchdog.run(), name="the watchdog"),
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

    async def _fetch(self, epochs: Epochs, watchdog: Watchdog) -> None:
        while True:
            watchdog.turn()
            partitions, limit = self._readable()
            if not limit:
                await _within(self._settled, 0.05)
                continue
            try:
                found = await self._consumer.getmany(
                    *partitions, timeout_ms=FETCH_MILLISECONDS, max_records=limit
                )
            except (CorruptRecordException, UnicodeDecodeError) as error:
                found = await self._get_past(epochs, error, partitions, limit)
            if found:
                watchdog.heard()
                self._hand_out(epochs, found)
            await epochs.see_tails()

    def _readable(self) -> tuple[Sequence[TopicPartition], int]:
        """The partitions to read from, and how many records at most."""
        room = self._flow.room()
        begun = self._epochs.begun if self._epochs is not None else {}
        left = {partition: CAP - tracker.uncommitted for partition, tracker in begun.items()}
        open_ = {partition: records for partition, records in left.items() if records > 0}
        return tuple(open_), min(room, *open_.values()) if open_ else 0

    def _hand_out(self, epochs: Epochs, found: Mapping[TopicPartition, Sequence[Any]]) -> None:
        begun = epochs.begun
        found = dict(found)
        # A rebalance came while they were fetched.
        early = {partition: found.pop(partition) for partition in list(found) if partition not in begun}
        if not self._flow.hand_out(sum(map(len, found.values()))):  # paused meanwhile
            early |= found
            found.clear()
        for partition, records in early.items():
            self._consumer.seek(partition, records[0].offset)
        if not found:
            return
        deliveries = []
        for partition, records in found.items():
            tracker = epochs.delivered(partition, [record.offset for record in records])
            deliveries += [
                KafkaDelivery(
                    message_from(record, self._reading.broker, redelivered=tracker.suspect(record.offset)),
                    tracker,
                    record.offset,
                    self._flow,
                )
                for record in records
            ]
        try:
            self._deliver(deliveries)
        except BaseException:
            for delivery in deliveries:
                delivery.drop()
            raise

    async def _get_past(
        self, epochs: Epochs, error: Exception, partitions: Sequence[TopicPartition], limit: int
    ) -> Mapping[TopicPartition, Sequence[Any]]:
        """The records at the place where aiokafka's decoder failed, read leniently.

        The failed fetch may have moved positions past records that it then lost, so all are set back first.
        Where that is not possible (a rebalance came between), the error stands: the consumer is built anew.
        """
        log.debug("%s: %s", self._reading.description, told(error))
        starts = {partition: epochs.get(partition) for partition in partitions}
        if None in starts.values():
            raise error
        for partition, tracker in starts.items():
            await self._set_back(partition, tracker)
        for partition, tracker in starts.items():
            position = await epochs.position(partition)
            if position is None:
                continue
            records, after = await reread(self._consumer, partition, position, limit)
            if epochs.get(partition) is not tracker:
                break
            if records:
                self._consumer.seek(partition, after)
                return {partition: records}
        raise error

    async def _set_back(self, partition: TopicPartition, tracker: Tracker | None) -> None:
        """To the record after the last that was delivered, else to where the assignment began."""
        position = tracker.next_offset if tracker is not None else None
        if position is None:
            position = await self._consumer.committed(partition)
        if position is None:
            await self._consumer.seek_to_beginning(partition)
        else:
            self._consumer.seek(partition, position)

    async def _commits(self, epochs: Epochs) -> None:
        while True:
            await _within(self._finished, COMMIT_INTERVAL)
            await epochs.begin()
            self._settled.set()  # there may be more to read from
            self._flow.committing()
            await epochs.commit()

    async def _leave(self, epochs: Epochs, remaining: Callable[[], float], orderly: bool) -> None:
        """Commit what is finished, if all is well, and leave the group; in bounded time."""
        if orderly:
            await self._tried(epochs.leave(), remaining() / 2)
        epochs.end()
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
