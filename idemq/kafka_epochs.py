"""What may be committed, while partitions come and go.

An epoch is one assignment of a partition; it has a `Tracker`, which is made by the assignment. Nothing is
handed out before the epoch has begun, which is when its mark is committed: so the next owner can tell that
there was one, however soon it dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from threading import Event
from time import monotonic
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from idemq.kafka_connect import Reading, Stuck, log, told
from idemq.offsets import Tracker, suspects_before

#: aiokafka repeats a commit for ever; after this long the consumer is built anew.
COMMIT_SECONDS = 10.0
#: How long to wait for what aiokafka will know of a partition soon; then it is asked again.
ASK_SECONDS = 0.2
#: How long a partition may take to tell its end: a slow one gets more suspects, but it does get read.
END_SECONDS = 2.0
#: How often the tails of partitions are looked at.
TAIL_SECONDS = 0.2


class Epochs(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped for mypy here
    """The epochs of one consumer, on its loop's thread."""

    def __init__(
        self, consumer: AIOKafkaConsumer, reading: Reading, closing: Event, assigned: Callable[[], None]
    ) -> None:
        self.joined_at: float | None = None
        #: What went wrong while partitions were taken away: aiokafka would only log it.
        self.error: Exception | None = None
        self._consumer = consumer
        self._reading = reading
        self._closing = closing
        self._assigned = assigned
        self._trackers: dict[TopicPartition, Tracker] = {}
        self._committing = asyncio.Lock()
        self._tails_seen = monotonic()

    def get(self, partition: TopicPartition) -> Tracker | None:
        return self._trackers.get(partition)

    @property
    def begun(self) -> Mapping[TopicPartition, Tracker]:
        """Those of whose partitions records may be handed out."""
        return {partition: tracker for partition, tracker in self._trackers.items() if tracker.begun}

    def delivered(self, partition: TopicPartition, offsets: Sequence[int]) -> Tracker:
        """The tracker of records that are handed out next."""
        tracker = self._trackers[partition]
        if tracker.next_offset is not None and offsets[0] < tracker.next_offset:
            tracker.end()  # the topic was deleted and made anew
            tracker = self._trackers[partition] = Tracker()
            tracker.begin(offsets[0], 0)
            tracker.committed(offsets[0])
        tracker.delivered(offsets)
        return tracker

    async def position(self, partition: TopicPartition) -> int | None:
        """Where the partition is read next; None while aiokafka does not know."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
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
        for partition, tracker in self.begun.items():
            if tracker.unfinished:
                continue
            position = await self.position(partition)
            if position is not None and self._trackers.get(partition) is tracker:
                tracker.skipped_to(position)

    async def begin(self) -> None:
        """Commit the mark of every epoch that has none yet, where it begins."""
        fresh = {partition: tracker for partition, tracker in self._trackers.items() if not tracker.begun}
        if not fresh:
            return
        async with self._committing:
            offsets = {}
            for partition, (position, before) in (await self._starts(fresh)).items():
                # A rebalance may have come in between: then what was read is of another epoch.
                if self._trackers.get(partition) is fresh[partition]:
                    fresh[partition].begin(position, before)
                    offsets[partition] = position, fresh[partition].mark(position, self._reading.owner)
            await self._send(offsets, fresh)

    async def _starts(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """Where each begins, and before which offset its records are suspects; those that can tell it now."""
        async with _answered(self._reading):
            # `committed` of the consumer itself would keep the metadata back.
            found = await self._consumer._coordinator.fetch_committed_offsets(list(partitions))
            starts = await asyncio.gather(
                *[self._start(partition, found.get(partition)) for partition in partitions]
            )
        return {partition: start for partition, start in zip(partitions, starts, strict=True) if start}

    async def _start(self, partition: TopicPartition, found: Any) -> tuple[int, int] | None:
        if found is None:  # there was never an owner
            position = await self.position(partition)
            return None if position is None else (position, 0)
        before = suspects_before(found.metadata, self._reading.owner)
        if before > found.offset:
            with suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    ends = await self._consumer.end_offsets([partition])
                # What is written from now on, nobody can have had.
                before = min(before, ends[partition])
        return found.offset, before

    async def commit(self) -> None:
        """Commit what is finished, one commit at a time."""
        async with self._committing:
            trackers = self.begun
            offsets = {
                partition: (position, tracker.mark(position, self._reading.owner))
                for partition, tracker in trackers.items()
                if (position := tracker.committable()) is not None
            }
            await self._send(offsets, trackers)

    async def leave(self) -> None:
        """The last commit: it says what of these epochs is suspect, if anything is."""
        for tracker in self._trackers.values():
            tracker.stop_starting()
        async with self._committing:
            trackers = dict(self._trackers)
            offsets = {
                partition: last
                for partition, tracker in trackers.items()
                if (last := tracker.leaving(self._reading.owner)) is not None
            }
            await self._send(offsets, trackers)

    async def _send(
        self,
        offsets: Mapping[TopicPartition, tuple[int, str]],
        trackers: Mapping[TopicPartition, Tracker],
    ) -> None:
        """Commit these. The group's refusal only announces a rebalance."""
        if not offsets:
            return
        try:
            async with _answered(self._reading):
                await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError) as error:
            log.debug("%s: %s", self._reading.description, told(error))
            return
        for partition, (position, _) in offsets.items():
            trackers[partition].committed(position)

    async def on_partitions_revoked(self, revoked: object) -> None:
        """All partitions, whatever is named: aiokafka knows only the eager protocol."""
        try:
            async with asyncio.timeout(0.9 * self._reading.rebalance_timeout):
                await self._drain(0.6 * self._reading.rebalance_timeout)
                await self.leave()
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
        self.end()
        self._trackers = {partition: Tracker() for partition in assigned}
        self.joined_at = monotonic()
        self._assigned()


@asynccontextmanager
async def _answered(reading: Reading) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(COMMIT_SECONDS):
            yield
    except TimeoutError:
        raise Stuck(f"{reading.description}: a commit got no answer in {COMMIT_SECONDS} s") from None
