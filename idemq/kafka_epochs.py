"""What may be committed, while partitions come and go.

An epoch is one assignment of a partition; it has a `Tracker`. Every tracker is made by an assignment or by
the first record of one, never while partitions are being taken away: only so is what lies before the
consumer's position known to be in the tracker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from threading import Event
from time import monotonic

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from idemq.kafka_connect import Reading, Stuck, log, told
from idemq.offsets import Tracker

#: aiokafka repeats a commit for ever; after this long the consumer is built anew.
COMMIT_SECONDS = 10.0
#: How often the tails of partitions are looked at.
TAIL_SECONDS = 0.2


class Epochs(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped for mypy here
    """The epochs of one consumer, on its loop's thread."""

    def __init__(self, consumer: AIOKafkaConsumer, reading: Reading, closing: Event) -> None:
        self.joined_at: float | None = None
        #: What went wrong while partitions were taken away: aiokafka would only log it.
        self.error: Exception | None = None
        self._consumer = consumer
        self._reading = reading
        self._closing = closing
        self._trackers: dict[TopicPartition, Tracker] = {}
        self._committing = asyncio.Lock()
        self._tails_seen = monotonic()

    def get(self, partition: TopicPartition) -> Tracker | None:
        return self._trackers.get(partition)

    def delivered(self, partition: TopicPartition, offsets: Sequence[int]) -> Tracker:
        """The tracker of records that are handed out next. They can come before the listener is called."""
        tracker = self._trackers.get(partition)
        if tracker is not None and tracker.next_offset is not None and offsets[0] < tracker.next_offset:
            tracker.end()  # the topic was deleted and made anew
            tracker = None
        if tracker is None:
            tracker = self._trackers[partition] = Tracker()
        tracker.delivered(offsets)
        return tracker

    async def position(self, partition: TopicPartition) -> int | None:
        """Where the partition is read next; None while aiokafka does not know."""
        try:
            async with asyncio.timeout(0.2):
                return int(await self._consumer.position(partition))
        except (TimeoutError, IllegalStateError):
            return None

    async def see_tails(self) -> None:
        """Pass what holds no records for us: control records, aborted transactions, compacted offsets.

        To be called between two fetches: then what the positions have passed is in the trackers.
        """
        if monotonic() - self._tails_seen < TAIL_SECONDS:
            return
        self._tails_seen = monotonic()
        for partition, tracker in list(self._trackers.items()):
            if tracker.unfinished:
                continue
            position = await self.position(partition)
            if position is not None and self._trackers.get(partition) is tracker:
                tracker.skipped_to(position)

    async def commit(self, metadata: str = "") -> None:
        """Commit what is finished, one commit at a time. The group's refusal only announces a rebalance."""
        async with self._committing:
            trackers = dict(self._trackers)
            offsets = {
                partition: (position, metadata)
                for partition, tracker in trackers.items()
                if (position := tracker.committable()) is not None
            }
            if not offsets:
                return
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

    async def on_partitions_revoked(self, revoked: object) -> None:
        """All partitions, whatever is named: aiokafka knows only the eager protocol."""
        try:
            async with asyncio.timeout(0.9 * self._reading.rebalance_timeout):
                await self._drain(0.6 * self._reading.rebalance_timeout)
                await self.commit()
        except Exception as error:
            self.error = error
        finally:
            self.end()

    async def _drain(self, seconds: float) -> None:
        """Let nothing more be started, and wait a while for what is."""
        until = monotonic() + seconds
        for tracker in self._trackers.values():
            tracker.stop_starting()
        while monotonic() < until and not self._closing.is_set():
            if not any(tracker.running for tracker in self._trackers.values()):
                return
            await asyncio.sleep(0.01)

    def end(self) -> None:
        for tracker in self._trackers.values():
            tracker.end()
        self._trackers.clear()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        assigned = set(assigned)
        for partition in set(self._trackers) - assigned:
            self._trackers.pop(partition).end()
        for partition in assigned:
            self._trackers.setdefault(partition, Tracker())
        self.joined_at = monotonic()
