"""What the Kafka tests need of a server: topics, records (odd ones too), and the offsets of a group."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

from tests import servers

T = TypeVar("T")
Headers = Sequence[tuple[str, bytes]]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def create_topic(
    servers: str, topic: str, partitions: int = 1, configs: dict[str, str] | None = None
) -> None:
    async def work() -> None:
        async with _Admin(servers) as admin:
            new = NewTopic(topic, partitions, 1, topic_configs=configs or {})
            response = await admin.create_topics([new])
            assert response.topic_errors[0][1] == 0, response
            await _led(admin, topic, partitions)

    run(work())


async def _led(admin: AIOKafkaAdminClient, topic: str, partitions: int) -> None:
    """Creation is answered before the broker that clients ask knows of it."""
    async with asyncio.timeout(servers.PATIENCE):
        while True:
            (found,) = await admin.describe_topics([topic])
            if sum(each["leader"] >= 0 for each in found["partitions"]) == partitions:
                return
            await asyncio.sleep(0.05)


def delete_topic(servers: str, topic: str) -> None:
    async def work() -> None:
        async with _Admin(servers) as admin:
            await admin.delete_topics([topic])

    run(work())


def topics(servers: str) -> set[str]:
    async def work() -> set[str]:
        async with _Admin(servers) as admin:
            return set(await admin.list_topics())

    return run(work())


def committed(servers: str, group: str, topic: str) -> dict[int, int]:
    """Partition -> committed offset of the group."""
    return {partition: offset for partition, (offset, _) in marks(servers, group, topic).items()}


def marks(servers: str, group: str, topic: str) -> dict[int, tuple[int, str]]:
    """Partition -> committed offset of the group, and the metadata beside it."""

    async def work() -> dict[int, tuple[int, str]]:
        async with _Admin(servers) as admin:
            offsets = await admin.list_consumer_group_offsets(group)
            return {
                tp.partition: (meta.offset, meta.metadata)
                for tp, meta in offsets.items()
                if tp.topic == topic
            }

    return run(work())


def commit(servers: str, group: str, topic: str, offset: int, metadata: str = "") -> None:
    """What any other client of the group may have committed for partition 0."""
    from aiokafka import AIOKafkaConsumer

    async def work() -> None:
        consumer = AIOKafkaConsumer(bootstrap_servers=servers, group_id=group, enable_auto_commit=False)
        try:
            await consumer.start()
            partition = TopicPartition(topic, 0)
            consumer.assign([partition])
            await consumer.commit({partition: (offset, metadata)})
        finally:
            await consumer.stop()

    run(work())


def members(servers: str, group: str) -> tuple[str, list[str]]:
    """State of the group and the ids of its members."""

    async def work() -> tuple[str, list[str]]:
        async with _Admin(servers) as admin:
            (response,) = await admin.describe_consumer_groups([group])
            found = response.groups[0]
            return str(found[2]), [str(member[0]) for member in found[5]]

    return run(work())


def evict(servers: str, group: str) -> None:
    """Every member leaves the group, as a dead one does when its session times out."""

    async def work() -> None:
        async with _Admin(servers) as admin:
            coordinator = await admin.find_coordinator(group)
            (response,) = await admin.describe_consumer_groups([group])
            for member in response.groups[0][5]:
                await admin._client.send(coordinator, LeaveGroupRequest(group, member[0]))

    run(work())


def ends(servers: str, topic: str, partitions: int) -> dict[int, int]:
    """Partition -> end offset, as a consumer of committed records sees it."""
    from aiokafka import AIOKafkaConsumer

    async def work() -> dict[int, int]:
        consumer = AIOKafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed")
        try:
            await consumer.start()
            found = await consumer.end_offsets([TopicPartition(topic, n) for n in range(partitions)])
            return {tp.partition: offset for tp, offset in found.items()}
        finally:
            await consumer.stop()

    return run(work())


def produce(
    servers: str,
    topic: str,
    values: Iterable[bytes | None],
    *,
    partition: int | None = None,
    keys: bool = False,
    headers: Headers = (),
    **options: Any,
) -> None:
    """Send `values` and wait for all; with `keys`, the value is the key too."""

    async def work() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", **options)
        try:
            await producer.start()
            sent = [
                await producer.send(
                    topic,
                    value,
                    key=value if keys or value is None else None,
                    partition=partition,
                    headers=headers,
                )
                if value is not None
                else await producer.send(topic, None, key=b"tombstone", partition=partition)
                for value in values
            ]
            await asyncio.gather(*sent)
        finally:
            await producer.stop()

    run(work())


def produce_transaction(servers: str, topic: str, values: Sequence[bytes], *, commit: bool) -> None:
    async def work() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=servers, transactional_id=f"tx-{topic}-{commit}")
        try:
            await producer.start()
            await producer.begin_transaction()
            for value in values:
                await producer.send_and_wait(topic, value, partition=0)
            await (producer.commit_transaction() if commit else producer.abort_transaction())
        finally:
            await producer.stop()

    run(work())


class _Raw(str):
    """A header name that is written as bytes which are no UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"\xff\xfe" + super().encode(encoding, errors)


def produce_odd_header(
    servers: str, topic: str, values: Sequence[bytes], *, good: Sequence[bytes] = ()
) -> None:
    """Records with a header name that is not UTF-8, in one batch with `good` ones before and after."""

    async def work() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=servers)
        try:
            await producer.start()
            batch = producer.create_batch()
            # aiokafka's builder in C refuses such names; the one in Python writes what it is told.
            builder = _DefaultRecordBatchBuilderPy(2, 0, False, -1, -1, 0, 1_000_000)
            half = len(good) // 2
            rows: list[tuple[bytes, list[tuple[str, bytes]]]] = [(value, []) for value in good[:half]]
            rows += [(value, [(_Raw("name"), b"1"), ("message-id", b"m1")]) for value in values]
            rows += [(value, []) for value in good[half:]]
            for offset, (value, headers) in enumerate(rows):
                assert builder.append(offset, 1_700_000_000_000, b"key", value, headers) is not None
            batch._builder = builder
            batch._relative_offset = len(rows)
            await (await producer.send_batch(batch, topic, partition=0))
        finally:
            await producer.stop()

    run(work())


class _Admin:
    def __init__(self, servers: str) -> None:
        self._servers = servers

    async def __aenter__(self) -> Any:
        self._client = AIOKafkaAdminClient(bootstrap_servers=self._servers)
        await self._client.start()
        return self._client

    async def __aexit__(self, *exc: object) -> None:
        await self._client.close()


@dataclass
class Broker:
    """A broker of the test's own: may be restarted, wants a password at `secure`, allows short sessions."""

    servers: str
    secure: str
    container: Any

    def restart(self) -> None:
        self.container.get_wrapped_container().restart(timeout=20)


USER, PASSWORD = "shop", "s3cret-never-shown"


@contextmanager
def own_broker() -> Iterator[Broker]:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy

    servers.require_engine()
    container = DockerContainer(servers.SERVERS["kafka"][1])

    plain, secure = servers.free_port(), servers.free_port()
    login = "org.apache.kafka.common.security.plain.PlainLoginModule"
    settings = {
        "LISTENERS": "PLAINTEXT://0.0.0.0:9092,SECURE://0.0.0.0:9094,CONTROLLER://0.0.0.0:9093",
        "ADVERTISED_LISTENERS": f"PLAINTEXT://localhost:{plain},SECURE://localhost:{secure}",
        "LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_PLAINTEXT",
        "INTER_BROKER_LISTENER_NAME": "PLAINTEXT",
        "SASL_ENABLED_MECHANISMS": "PLAIN",
        "LISTENER_NAME_SECURE_PLAIN_SASL_JAAS_CONFIG": f'{login} required user_{USER}="{PASSWORD}";',
        "PROCESS_ROLES": "broker,controller",
        "NODE_ID": "1",
        "CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "OFFSETS_TOPIC_NUM_PARTITIONS": "5",
        "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "GROUP_MIN_SESSION_TIMEOUT_MS": "500",
    }
    container.with_bind_ports(9092, plain).with_bind_ports(9094, secure)
    for name, value in settings.items():
        container.with_env(f"KAFKA_{name}", value)
    container.waiting_for(LogMessageWaitStrategy("Kafka Server started").with_startup_timeout(90))
    with container:
        yield Broker(f"localhost:{plain}", f"localhost:{secure}", container)


def hold(servers: str, topic: str, group: str, *finish: str) -> None:
    """Read until killed: start every record, print its offset, acknowledge those at the offsets `finish`."""
    from idemq.broker import Delivery
    from idemq.kafka import Kafka

    def show(deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            offset = delivery.message.origin["offset"]
            if delivery.start() and str(offset) in finish:
                delivery.ack()
            print(offset, flush=True)

    Kafka(servers).topic(topic, group=group, session_timeout=6).subscribe("hold", show, 5_000)
    threading.Event().wait()


if __name__ == "__main__":
    hold(*sys.argv[1:])
