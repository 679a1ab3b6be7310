"""The loops that a careful user would write without idemq: the claim in the work's transaction, ack after it.

They have no guard, and nothing for failures, bad messages, conflicts, rebalances or lost connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import kombu
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from benchmarks.work import CLAIM, Payment, Work

#: Which consumer's claims these are.
CONSUMER = 1
#: Kafka: so many records are committed at a time.
COMMIT_EVERY = 100

_decode = msgspec.json.Decoder(Payment).decode


def _process(make: sessionmaker[Session], work: Work, identifier: str, body: bytes) -> None:
    payment = _decode(body)
    with make.begin() as session:
        if session.scalar(CLAIM, {"consumer": CONSUMER, "id": identifier}) is not None:
            work.handle(payment, session)


async def _process_async(
    make: async_sessionmaker[AsyncSession], work: Work, identifier: str, body: bytes
) -> None:
    payment = _decode(body)
    async with make.begin() as session:
        if await session.scalar(CLAIM, {"consumer": CONSUMER, "id": identifier}) is not None:
            await work.handle_async(payment, session)


def rabbitmq(url: str, queue: str, engine: Engine, prefetch: int, work: Work) -> None:
    """kombu: one thread, one acknowledgement each."""
    make = sessionmaker(engine)

    def on_message(message: Any) -> None:
        _process(make, work, message.properties["message_id"], message.body)
        message.ack()

    with (
        kombu.Connection(url) as connection,
        kombu.Consumer(
            connection, kombu.Queue(queue, no_declare=True), on_message=on_message, prefetch_count=prefetch
        ),
    ):
        while not work.stopped:
            with suppress(TimeoutError):
                connection.drain_events(timeout=1)


def _identifier(record: Any) -> str:
    value: bytes = next(value for name, value in record.headers if name == "message-id")
    return value.decode()


class _Commits:
    """Commits offsets beside the work."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self._done = 0
        self._task: asyncio.Task[None] | None = None

    async def done(self, records: Sequence[Any]) -> None:
        self._done += len(records)
        if self._done >= COMMIT_EVERY:
            self._done = 0
            if self._task is not None:
                await self._task
            last = records[-1]
            offsets = {TopicPartition(last.topic, last.partition): last.offset + 1}
            self._task = asyncio.create_task(self._consumer.commit(offsets))

    async def close(self) -> None:
        if self._task is not None:
            await self._task


async def _kafka(servers: str, topic: str, group: str, work: Work, prefetch: int, run: Any) -> None:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        group_id=group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    try:
        commits = _Commits(consumer)
        while not work.stopped:
            found = await consumer.getmany(timeout_ms=200, max_records=prefetch)
            for records in found.values():
                await run(records)
                await commits.done(records)
        await commits.close()
    finally:
        await consumer.stop()


def kafka(servers: str, topic: str, group: str, engine: Engine, prefetch: int, work: Work) -> None:
    """aiokafka reads, a thread works: one hand-over for all records of a fetch."""
    make = sessionmaker(engine)

    def all_of(records: Sequence[Any]) -> None:
        for record in records:
            _process(make, work, _identifier(record), record.value)

    async def run(records: Sequence[Any]) -> None:
        await asyncio.to_thread(all_of, records)

    asyncio.run(_kafka(servers, topic, group, work, prefetch, run))


def kafka_async(servers: str, topic: str, group: str, engine: AsyncEngine, prefetch: int, work: Work) -> None:
    """aiokafka and an AsyncSession on one event loop."""
    make = async_sessionmaker(engine)

    async def run(records: Sequence[Any]) -> None:
        for record in records:
            await _process_async(make, work, _identifier(record), record.value)

    async def main() -> None:
        await _kafka(servers, topic, group, work, prefetch, run)
        await engine.dispose()  # its connections belong to this event loop

    asyncio.run(main())
