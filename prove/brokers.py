"""What the kill loop asks of a broker: a place for messages, how many are left, and who must leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pika
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.group import LeaveGroupRequest

from idemq.embedded import Embedded

T = TypeVar("T")


class Broker(Protocol):
    #: Given to the application and the publisher.
    url: str
    #: Kafka redistributes partitions only when all dead members are gone, so it kills all workers at once.
    kills_all: bool

    def create(self, name: str, *, single: bool) -> None:
        """`single`: one worker at a time has what is in the queue."""
        ...

    def left(self, name: str) -> int: ...
    def evict(self, name: str) -> None: ...
    def remove(self, name: str) -> None: ...


class RabbitMQ:
    kills_all = False

    def __init__(self, url: str) -> None:
        self.url = url.removesuffix("//") + "/%2F" if url.endswith("//") else url  # kombu knows both

    def create(self, name: str, *, single: bool) -> None:
        arguments = {"x-single-active-consumer": True} if single else {}
        self._call(lambda channel: channel.queue_declare(name, durable=True, arguments=arguments))

    def left(self, name: str) -> int:
        """Ready messages; what a live worker holds is not seen, so ask again when the workers have gone."""
        declared = self._call(lambda channel: channel.queue_declare(name, passive=True))
        return int(declared.method.message_count)

    def evict(self, name: str) -> None:
        """Nothing to do: a dead connection gives its deliveries back at once."""

    def remove(self, name: str) -> None:
        self._call(lambda channel: channel.queue_delete(name))

    def _call(self, call: Callable[[Any], Any]) -> Any:
        with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
            return call(connection.channel())


class Kafka:
    kills_all = True
    partitions = 6

    def __init__(self, servers: str) -> None:
        self.url = servers

    def create(self, name: str, *, single: bool) -> None:
        topic = NewTopic(name, num_partitions=self.partitions, replication_factor=1)
        self._admin(lambda admin: admin.create_topics([topic]))

    def left(self, name: str) -> int:
        """Records after the committed offsets of the group."""
        return asyncio.run(self._lag(name))

    async def _lag(self, name: str) -> int:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.url, group_id=name, enable_auto_commit=False)
        await consumer.start()
        try:
            every = [TopicPartition(name, number) for number in range(self.partitions)]
            ends = await consumer.end_offsets(every)
            return sum([ends[each] - (await consumer.committed(each) or 0) for each in every])
        finally:
            await consumer.stop()

    def evict(self, name: str) -> None:
        """Make every member leave the group; the dead would hold their partitions until their time-out."""
        self._admin(lambda admin: self._leave(admin, name))

    async def _leave(self, admin: AIOKafkaAdminClient, name: str) -> None:
        coordinator = await admin.find_coordinator(name)
        for response in await admin.describe_consumer_groups([name]):
            for group in response.groups:
                for member in group[5]:
                    await admin._client.send(coordinator, LeaveGroupRequest(name, member[0]))

    def remove(self, name: str) -> None:
        self._admin(lambda admin: admin.delete_topics([name]))

    def _admin(self, call: Callable[[AIOKafkaAdminClient], Coroutine[Any, Any, T]]) -> T:
        async def run() -> T:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.url)
            await admin.start()
            try:
                return await call(admin)
            finally:
                await admin.close()

        return asyncio.run(run())


class File:
    """The embedded broker."""

    kills_all = False

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._embedded = Embedded(path)

    def create(self, name: str, *, single: bool) -> None:
        self._embedded.declare(name)

    def left(self, name: str) -> int:
        return sum(self._embedded.depth(name))

    def evict(self, name: str) -> None:
        """Nothing to do: the operating system frees the locks of a dead process."""

    def remove(self, name: str) -> None:
        """The file goes with its directory."""
        self._embedded.close()
