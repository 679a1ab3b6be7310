"""The broker that the environment names: RABBITMQ_URL, else KAFKA_SERVERS, else the embedded one.

`source` is all that the application needs; the rest is for the scripts around it. A client library is
imported only for the broker that is chosen.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

from idemq import Message
from idemq.broker import Source
from idemq.embedded import Embedded

T = TypeVar("T")


class Broker(Protocol):
    def source(self) -> Source:
        """What the consumer reads from; made when it is missing."""

    def publish(self, payments: Sequence[str]) -> None:
        """One message for each, in this order; the broker has all of them when this returns."""

    def left(self) -> int:
        """Messages that nobody has acknowledged. On RabbitMQ without those that a worker holds."""

    def remove(self) -> None:
        """Delete the queue or topic; Kafka forgets the group's positions by itself."""


def broker() -> Broker:
    name = os.environ.get("PAYMENTS", "payments.settled")
    if url := os.environ.get("RABBITMQ_URL"):
        return OnRabbitMQ(url, name)
    if servers := os.environ.get("KAFKA_SERVERS"):
        return OnKafka(servers, name)
    return OnFile(Path("broker.db"), name)


def body(payment: str) -> bytes:
    return json.dumps({"payment": payment, "phone": "+49 30 5550100"}).encode()


class OnFile:
    def __init__(self, path: Path, name: str) -> None:
        self._embedded, self._name = Embedded(path), name

    def source(self) -> Source:
        return self._embedded.queue(self._name, declare=True)

    def publish(self, payments: Sequence[str]) -> None:
        self._embedded.publish_many(self._name, [Message(body=body(each), id=each) for each in payments])

    def left(self) -> int:
        return sum(self._embedded.depth(self._name))

    def remove(self) -> None:
        """The file goes with its directory."""


class OnRabbitMQ:
    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name

    def source(self) -> Source:
        from idemq.rabbitmq import RabbitMQ

        return RabbitMQ(self._url).queue(self._name, declare=True)

    def publish(self, payments: Sequence[str]) -> None:
        def send(channel: Any) -> None:
            import kombu

            producer = kombu.Producer(channel)
            for each in payments:
                producer.publish(
                    body(each),
                    routing_key=self._name,
                    mandatory=True,
                    delivery_mode="persistent",
                    content_type="application/json",
                    content_encoding="utf-8",
                    message_id=each,
                )

        self._with_channel(send)

    def left(self) -> int:
        return self._with_channel(
            lambda channel: int(channel.queue_declare(self._name, passive=True).message_count)
        )

    def remove(self) -> None:
        self._with_channel(lambda channel: channel.queue_delete(self._name))

    def _with_channel(self, work: Callable[[Any], T]) -> T:
        import kombu

        with (
            kombu.Connection(self._url, transport_options={"confirm_publish": True}) as connection,
            closing(connection.channel()) as channel,
        ):
            return work(channel)


class OnKafka:
    #: The copy of a message goes to the next partition, so that both workers have it at the same time.
    partitions = 2

    def __init__(self, servers: str, name: str) -> None:
        self._servers, self._name = servers, name

    def source(self) -> Source:
        from idemq.kafka import Kafka

        # A killed worker's partitions wait for its session to end; 6 s is the least that Kafka allows.
        kafka = Kafka(self._servers)
        return kafka.topic(
            self._name, group=self._name, declare=True, partitions=self.partitions, session_timeout=6
        )

    def publish(self, payments: Sequence[str]) -> None:
        asyncio.run(self._publish(payments))

    async def _publish(self, payments: Sequence[str]) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(bootstrap_servers=self._servers, acks="all", enable_idempotence=True)
        try:
            await producer.start()
            sent: list[Awaitable[Any]] = []
            for number, each in enumerate(payments):
                headers = [("message-id", each.encode())]
                partition = number % self.partitions
                sent.append(await producer.send(self._name, body(each), partition=partition, headers=headers))
            await asyncio.gather(*sent)
        finally:
            await producer.stop()

    def left(self) -> int:
        return asyncio.run(self._lag())

    async def _lag(self) -> int:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._servers, group_id=self._name, enable_auto_commit=False
        )
        await consumer.start()
        try:
            every = [TopicPartition(self._name, number) for number in range(self.partitions)]
            ends = await consumer.end_offsets(every)
            return sum([ends[each] - (await consumer.committed(each) or 0) for each in every])
        finally:
            await consumer.stop()

    def remove(self) -> None:
        asyncio.run(self._remove())

    async def _remove(self) -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        admin = AIOKafkaAdminClient(bootstrap_servers=self._servers)
        await admin.start()
        try:
            await admin.delete_topics([self._name])
        finally:
            await admin.close()
