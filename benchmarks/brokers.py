"""Queues and topics with messages in them, made before the clock starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import kombu
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks.work import body


def _ids(count: int) -> Iterator[tuple[str, bytes]]:
    for number in range(count):
        yield str(uuid4()), body(number)


@contextmanager
def filled_queue(url: str, count: int) -> Iterator[str]:
    """A durable queue with `count` persistent messages, and gone afterwards."""
    name = f"bench-{uuid4().hex[:12]}"
    with kombu.Connection(url, transport_options={"confirm_publish": True}) as connection:
        queue = kombu.Queue(name, durable=True)(connection.default_channel)
        queue.declare()
        producer = connection.Producer()
        try:
            for identifier, content in _ids(count):
                producer.publish(
                    content,
                    routing_key=name,
                    message_id=identifier,
                    content_type="application/json",
                    content_encoding="utf-8",
                )
            yield name
        finally:
            queue.delete()


@contextmanager
def filled_topic(servers: str, count: int) -> Iterator[str]:
    """A topic of one partition with `count` records; every round reads it with a group of its own."""
    name = f"bench-{uuid4().hex[:12]}"
    asyncio.run(_fill(servers, name, count))
    try:
        yield name
    finally:
        asyncio.run(_delete(servers, name))


async def _fill(servers: str, topic: str, count: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1)])
    await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=servers, linger_ms=5) as producer:
        sent = [
            await producer.send(topic, content, headers=[("message-id", identifier.encode())])
            for identifier, content in _ids(count)
        ]
        await asyncio.gather(*sent)


async def _delete(servers: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    await admin.delete_topics([topic])
    await admin.close()
