"""Notices a consumer that is broken or makes no progress: aiokafka does not always notice, nor speak up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from time import monotonic

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from idemq.kafka_connect import Reading, Stuck
from idemq.kafka_epochs import Epochs


class Watchdog:
    """`run` raises when the consumer must be built anew."""

    def __init__(
        self,
        consumer: AIOKafkaConsumer,
        reading: Reading,
        epochs: Epochs,
        readable: Callable[[], tuple[Collection[TopicPartition], int]],
    ) -> None:
        self._consumer = consumer
        self._reading = reading
        self._epochs = epochs
        self._readable = readable
        self._turn = self._answered = monotonic()
        self._moves: dict[TopicPartition, tuple[int, float]] = {}

    def turn(self) -> None:
        """The fetch loop goes round."""
        self._turn = monotonic()

    def heard(self) -> None:
        """The cluster answered."""
        self._answered = monotonic()

    @property
    def connected(self) -> bool:
        return (
            self._epochs.joined_at is not None
            and monotonic() - self._answered < self._reading.session_timeout
        )

    async def run(self) -> None:
        interval = min(3.0, self._reading.session_timeout / 3)
        while True:
            await asyncio.sleep(interval)
            # Private, but otherwise errors are told only to one who fetches, and at times nobody does.
            self._consumer._coordinator.check_errors()
            if self._epochs.error is not None:
                raise self._epochs.error
            if self._long_since(self._turn):
                raise self._stuck("no progress")
            await self._probe(interval)
            if self._long_since(self._answered):
                raise self._stuck("no answer from the cluster")

    async def _probe(self, seconds: float) -> None:
        """Ask for the ends of our partitions: a sign of life, and whether records lie there unread."""
        partitions = self._consumer.assignment()
        try:
            async with asyncio.timeout(seconds):
                # Asked for no partition at all it would not ask the cluster.
                ends = await self._consumer.end_offsets(partitions) if partitions else {}
                if not partitions:
                    await self._consumer.topics()
        except (KafkaError, TimeoutError):
            return
        self.heard()
        readable, room = self._readable()
        for partition, end in ends.items():
            position = await self._epochs.position(partition)
            if position is not None:
                waits = not room or partition not in readable or position >= end
                self._see_move(partition, position, waits)

    def _see_move(self, partition: TopicPartition, position: int, waits: bool) -> None:
        before, since = self._moves.get(partition, (None, 0.0))
        if waits or position != before:
            self._moves[partition] = (position, monotonic())
        elif self._long_since(since):
            raise self._stuck(f"records of partition {partition.partition} do not come")

    def _long_since(self, moment: float) -> bool:
        return monotonic() - moment > self._reading.stuck_after

    def _stuck(self, what: str) -> Stuck:
        return Stuck(f"{self._reading.description}: {what} for {self._reading.stuck_after:g} s")
