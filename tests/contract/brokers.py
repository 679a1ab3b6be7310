"""The brokers of the contract suite, each behind the same small adapter.

An adapter owns one fresh queue or topic. It publishes with the broker's plain client, never through idemq, so
that the tests see what other people's publishers send. A new broker gets the whole suite by one class here,
one line in `KINDS`, and one in the fixture of `conftest.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypedDict, Unpack

from idemq.broker import Source
from idemq.message import Message
from tests import kafka_tools
from tests.servers import eventually

#: A message to publish: its id (None: none at all) and its body.
Sent = tuple[str | None, bytes]

JSON = "application/json"


class Properties(TypedDict, total=False):
    """What a publisher says of a message; by default that it is JSON."""

    content_type: str
    encoding: str
    sent_at: datetime


#: It tells redelivered messages from new ones.
MARKS = "marks redelivered messages"
#: Any message can be settled before an older one, and stays settled.
SINGLY = "settles singly"
#: Header values keep their JSON types; otherwise they are texts.
TYPED = "typed headers"


class Broker(Protocol):
    """One queue or topic of a running broker. `spec` and `attach` take it to another process."""

    kind: str
    name: str
    features: ClassVar[frozenset[str]]
    #: The size of a body that it must carry, in bytes.
    large: ClassVar[int]

    def create(self) -> None: ...

    def remove(self) -> None: ...

    def source(self) -> Source:
        """The queue as idemq reads it."""
        ...

    def missing(self, *, declare: bool = False) -> Source:
        """A source that does not exist."""
        ...

    def unreachable(self) -> Source | None:
        """The same source on a server that does not answer; None where there is no server."""
        ...

    def publish(
        self,
        messages: Iterable[Sent],
        headers: Mapping[str, Any] | None = None,
        **properties: Unpack[Properties],
    ) -> None:
        """Publish in this order; returns when the broker has confirmed all.

        Without `sent_at` the broker's client says what it says by itself: now, or nothing (RabbitMQ).
        """
        ...

    def left(self) -> int:
        """How many messages are not settled. To be asked when all consumers are closed or closing."""
        ...


@dataclass
class EmbeddedBroker:
    address: str
    name: str
    kind: str = "embedded"

    features: ClassVar = frozenset({MARKS, SINGLY, TYPED})
    large: ClassVar = 5_000_000

    def _open(self) -> Any:
        from idemq.embedded import Embedded

        return Embedded(self.address)

    def create(self) -> None:
        self._open().declare(self.name)

    def remove(self) -> None:
        Path(self.address).unlink()

    def source(self) -> Source:
        source: Source = self._open().queue(self.name)
        return source

    def missing(self, *, declare: bool = False) -> Source:
        source: Source = self._open().queue(self.name + "-missing", declare=declare)
        return source

    def unreachable(self) -> Source | None:
        return None

    def publish(
        self,
        messages: Iterable[Sent],
        headers: Mapping[str, Any] | None = None,
        **properties: Unpack[Properties],
    ) -> None:
        embedded = self._open()
        common = Message(
            body=b"",
            headers=headers or {},
            content_type=properties.get("content_type", JSON),
            content_encoding=properties.get("encoding", "utf-8"),
            sent_at=properties.get("sent_at"),
        )
        embedded.publish_many(self.name, [replace(common, id=id, body=body) for id, body in messages])
        embedded.close()

    def left(self) -> int:
        embedded = self._open()
        try:
            return sum(embedded.depth(self.name))
        finally:
            embedded.close()


@dataclass
class RabbitBroker:
    """A durable queue on RabbitMQ, `quorum` or `classic`; `single`: for one consumer at a time."""

    address: str
    name: str
    kind: str = "rabbitmq"
    single: bool = False

    features: ClassVar = frozenset({MARKS, SINGLY, TYPED})
    large: ClassVar = 5_000_000

    @property
    def arguments(self) -> dict[str, Any]:
        kind = "classic" if self.kind.endswith("classic") else "quorum"
        return {"x-queue-type": kind} | ({"x-single-active-consumer": True} if self.single else {})

    def _connection(self) -> Any:
        from kombu import Connection

        return Connection(self.address, transport_options={"confirm_publish": True})

    def create(self) -> None:
        with self._connection() as connection, connection.channel() as channel:
            channel.queue_declare(self.name, durable=True, auto_delete=False, arguments=self.arguments)

    def remove(self) -> None:
        with self._connection() as connection, connection.channel() as channel:
            channel.queue_delete(self.name)
            channel.queue_delete(self.name + "-missing")

    def source(self) -> Source:
        from idemq.rabbitmq import RabbitMQ

        return RabbitMQ(self.address).queue(self.name, arguments=self.arguments if self.single else None)

    def missing(self, *, declare: bool = False) -> Source:
        from idemq.rabbitmq import RabbitMQ

        return RabbitMQ(self.address).queue(self.name + "-missing", declare=declare)

    def unreachable(self) -> Source | None:
        from idemq.rabbitmq import RabbitMQ

        return RabbitMQ("amqp://guest:verysecret@127.0.0.1:1//", connect_timeout=2).queue(self.name)

    def publish(
        self,
        messages: Iterable[Sent],
        headers: Mapping[str, Any] | None = None,
        **properties: Unpack[Properties],
    ) -> None:
        timestamp = {"timestamp": int(properties["sent_at"].timestamp())} if "sent_at" in properties else {}
        with self._connection() as connection, connection.Producer(serializer=None) as producer:
            for id, body in messages:
                producer.publish(
                    body,
                    exchange="",
                    routing_key=self.name,
                    content_type=properties.get("content_type", JSON),
                    content_encoding=properties.get("encoding", "utf-8"),
                    delivery_mode=2,
                    headers=dict(headers or {}),
                    **timestamp,
                    **({} if id is None else {"message_id": id}),
                )

    def left(self) -> int:
        # The protocol counts ready messages only: all are ready when nobody consumes.
        counts: list[tuple[int, int]] = []

        def alone() -> bool:
            counts[:] = [self._counts()]
            return counts[0][1] == 0

        eventually(alone, what=f"no consumers on {self.name}")
        return counts[0][0]

    def _counts(self) -> tuple[int, int]:
        """Ready messages, and consumers."""
        with self._connection() as connection, connection.channel() as channel:
            found = channel.queue_declare(self.name, passive=True)
            return found.message_count, found.consumer_count


@dataclass
class KafkaBroker:
    """A topic, read by a group of the same name; messages go to its partitions in turn."""

    address: str
    name: str
    kind: str = "kafka"
    partitions: int = 1

    features: ClassVar[frozenset[str]] = frozenset()
    large: ClassVar = 900_000

    def create(self) -> None:
        kafka_tools.create_topic(self.address, self.name, self.partitions)

    def remove(self) -> None:
        for topic in kafka_tools.topics(self.address) & {self.name, self.name + "-missing"}:
            kafka_tools.delete_topic(self.address, topic)

    def source(self) -> Source:
        from idemq.kafka import Kafka

        # The shortest that a stock server allows: so long it takes a killed member to be noticed.
        return Kafka(self.address).topic(self.name, group=self.name, session_timeout=6)

    def missing(self, *, declare: bool = False) -> Source:
        from idemq.kafka import Kafka

        return Kafka(self.address).topic(self.name + "-missing", group=self.name, declare=declare)

    def unreachable(self) -> Source | None:
        from idemq.kafka import Kafka

        return Kafka("127.0.0.1:1").topic(self.name, group=self.name)

    def publish(
        self,
        messages: Iterable[Sent],
        headers: Mapping[str, Any] | None = None,
        **properties: Unpack[Properties],
    ) -> None:
        named = {"content-type": properties.get("content_type", JSON), **(headers or {})}
        if "encoding" in properties:
            named["content-encoding"] = properties["encoding"]
        when = int(properties["sent_at"].timestamp() * 1000) if "sent_at" in properties else None
        asyncio.run(self._publish(list(messages), named, when))

    async def _publish(self, messages: list[Sent], headers: Mapping[str, Any], when: int | None) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(bootstrap_servers=self.address, acks="all", enable_idempotence=True)
        try:
            await producer.start()
            fixed = [
                (name, each.encode() if isinstance(each, str) else each)
                for name, value in headers.items()
                for each in (value if isinstance(value, list) else [value])
            ]
            await asyncio.gather(
                *[
                    await producer.send(
                        self.name,
                        body,
                        partition=number % self.partitions,
                        timestamp_ms=when,
                        headers=fixed if id is None else [*fixed, ("message-id", id.encode())],
                    )
                    for number, (id, body) in enumerate(messages)
                ]
            )
        finally:
            await producer.stop()

    def left(self) -> int:
        done = kafka_tools.committed(self.address, self.name, self.name)
        ends = kafka_tools.ends(self.address, self.name, self.partitions)
        return sum(end - max(done.get(partition, 0), 0) for partition, end in ends.items())


#: Every broker of the suite.
KINDS: dict[str, type[Broker]] = {
    "embedded": EmbeddedBroker,
    "rabbitmq": RabbitBroker,
    "rabbitmq-classic": RabbitBroker,
    "kafka": KafkaBroker,
}


@contextmanager
def another(broker: Broker) -> Iterator[Broker]:
    """A second queue on the same broker."""
    assert isinstance(broker, EmbeddedBroker | RabbitBroker | KafkaBroker)
    made = replace(broker, name=f"{broker.name}-second")
    if isinstance(made, EmbeddedBroker):
        made.address += "-second"
    made.create()
    try:
        yield made
    finally:
        made.remove()


def spec(broker: Broker) -> str:
    """The adapter as a text, for another process."""
    assert isinstance(broker, EmbeddedBroker | RabbitBroker | KafkaBroker)
    return json.dumps(asdict(broker))


def attach(text: str) -> Broker:
    """The adapter that `spec` described, for a queue that exists."""
    fields = json.loads(text)
    return KINDS[fields["kind"]](**fields)
