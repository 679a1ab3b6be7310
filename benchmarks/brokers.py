"""Queues and topics; messages appear in them all at once, so that nobody publishes while a side runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from uuid import uuid4

import kombu
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.work import body

#: Puts so many messages where the consumer finds them.
Fill = Callable[[int], None]

_numbers = count()


def _messages(number: int) -> Iterator[tuple[str, bytes]]:
    for _ in range(number):
        yield str(uuid4()), body(next(_numbers))


@contextmanager
def queue(url: str) -> Iterator[tuple[str, Fill]]:
    """A durable queue that gets persistent messages in transactions."""
    name = f"bench-{uuid4().hex[:12]}"
    with kombu.Connection(url) as connection:
        channel = connection.default_channel
        made = kombu.Queue(name, durable=True)(channel)
        made.declare()
        channel.tx_select()

        def fill(number: int) -> None:
            producer = connection.Producer(channel)
            for identifier, content in _messages(number):
                producer.publish(
                    content,
                    routing_key=name,
                    message_id=identifier,
                    content_type="application/json",
                    content_encoding="utf-8",
                )
            channel.tx_commit()

        try:
            yield name, fill
        finally:
            made.delete()


@contextmanager
def topic(servers: str) -> Iterator[tuple[str, Fill]]:
    """A topic of one partition that gets its records in one batch."""
    name = f"bench-{uuid4().hex[:12]}"
    with asyncio.Runner() as runner:
        runner.run(_create(servers, name))
        producer = runner.run(_producer(servers))
        try:
            yield name, lambda number: runner.run(_send(producer, name, number))
        finally:
            runner.run(producer.stop())
            runner.run(_delete(servers, name))


async def _producer(servers: str) -> AIOKafkaProducer:
    producer = AIOKafkaProducer(bootstrap_servers=servers, max_batch_size=256 * 1024)
    await producer.start()
    return producer


async def _send(producer: AIOKafkaProducer, name: str, number: int) -> None:
    batch = producer.create_batch()
    for identifier, content in _messages(number):
        headers = [("message-id", identifier.encode())]
        if batch.append(key=None, value=content, timestamp=None, headers=headers) is None:
            raise RuntimeError("the batch is too small for a round")
    await (await producer.send_batch(batch, name, partition=0))


async def _create(servers: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1)])
    await admin.close()


async def _delete(servers: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics([name])
    await admin.close()
