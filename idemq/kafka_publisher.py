"""Records to Kafka: sent is what all replicas in sync have, in the order of the batch within a partition.

After a timeout, a refused record or any error the producer is thrown away, with all that it still held.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    BrokerResponseError,
    InvalidTopicError,
    KafkaError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.protocol.metadata import MetadataRequest

from idemq.bridge import EventLoop
from idemq.broker import Unsendable
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka_connect import reach, told
from idemq.kafka_parcels import Record, record
from idemq.message import Message

#: Records for one partition travel together up to so many bytes; most topics take 1 MiB.
BATCH_BYTES = 128 * 1024
#: The clean-up of a producer that is thrown away.
_DISCARD_SECONDS = 1.0

_Answers = dict[int, str | None]


class KafkaPublisher:
    """A producer for one cluster: see `broker.Publisher`. Used by one thread."""

    def __init__(self, options: Callable[[], dict[str, Any]], description: str) -> None:
        #: The options of a client; refuses a forked process.
        self._options = options
        self._description = description
        self._loop: EventLoop | None = None
        self._producer: Any = None

    def publish(self, batch: Sequence[tuple[tuple[str, ...], Message]], timeout: float) -> list[str | None]:
        self._options()
        deadline = time.monotonic() + timeout
        answers: _Answers = {}
        records = []
        for place, (address, message) in enumerate(batch):
            try:
                records.append(record(place, address, message))
            except Unsendable as error:
                answers[place] = str(error)
        if records:
            self._run(self._publish(records, answers, deadline))
        return [answers[place] for place in range(len(batch))]

    def close(self) -> None:
        self._options()
        if self._loop is not None:
            self._run(self._discard())
            self._loop.close()
            self._loop = None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        if self._loop is None:
            self._loop = EventLoop("idemq-kafka-publisher")
        self._loop.run(work)

    async def _publish(self, records: list[Record], answers: _Answers, deadline: float) -> None:
        left, reason = records, ""
        try:
            while left:
                refused = await self._attempt(left, answers, deadline)
                reason = next(iter(refused.values()), reason)
                # The broker refuses a whole request of records: each of them goes alone now, and then those
                # that come after them in their partition, which were held back.
                for each in left:
                    if each.place in refused and each.place not in answers:
                        answers.update(await self._attempt([each], answers, deadline))
                left = [each for each in left if each.place not in answers]
        except BrokerUnavailable:
            if not reason or time.monotonic() < deadline:
                raise
            # What is known is told: the same batch would end the same way for ever.
            late = f"the time was over before its turn came, after others with it: {reason}"
            answers.update({each.place: late for each in records if each.place not in answers})

    async def _attempt(self, records: list[Record], answers: _Answers, deadline: float) -> dict[int, str]:
        """Publish them, up to what is refused in each partition, and write to `answers` what is certain.

        Returns what was refused, together with others or alone. Raises `BrokerUnavailable`.
        """
        orderly = False
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                producer = await self._connected()
                await _find_topics(producer, records, answers)
                refused = await _send(producer, records, answers)
            orderly = not refused
        except TimeoutError:
            raise BrokerUnavailable(f"{self._description}: no answer in time") from None
        except SetupError as error:  # somebody has to act, and meanwhile nothing can be sent
            raise BrokerUnavailable(str(error)) from error
        except (KafkaError, OSError) as error:
            raise BrokerUnavailable(f"{self._description}: {told(error)}") from error
        finally:
            if not orderly:
                await self._discard()
        return refused

    async def _connected(self) -> Any:
        if self._producer is None:
            options = self._options()
            await reach(options)
            self._producer = AIOKafkaProducer(
                **options, acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES
            )
            await self._producer.start()
        return self._producer

    async def _discard(self) -> None:
        """Have nothing more sent, whatever the producer still holds, and close its connections."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        await _end_tasks()  # stop() would wait until everything is sent
        await asyncio.wait([asyncio.create_task(producer.stop())], timeout=_DISCARD_SECONDS)
        await _end_tasks()


async def _end_tasks() -> None:
    """The loop has no other tasks than those of its producer."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_DISCARD_SECONDS)


async def _find_topics(producer: Any, records: Iterable[Record], answers: _Answers) -> None:
    """Answer for the topics that cannot be written to. (To ask by name as clients do may create a topic.)"""
    reasons = {
        UnknownTopicOrPartitionError.errno: "there is no topic {!r} (or this user may not see it): create it",
        TopicAuthorizationFailedError.errno: "this user may not write to the topic {!r}: allow it",
        InvalidTopicError.errno: "{!r} is no name for a topic",
    }
    names = {each.topic for each in records}
    response = await _ask(producer.client, MetadataRequest(sorted(names), allow_auto_topic_creation=False))
    missing = {name: reasons[code] for code, name, *_ in response.topics if code in reasons}
    answers.update(
        {each.place: missing[each.topic].format(each.topic) for each in records if each.topic in missing}
    )


async def _ask(client: Any, request: Any) -> Any:
    """The answer of the first broker that gives one."""
    failure: Exception = BrokerUnavailable("Kafka names no broker")
    for broker in client.cluster.brokers():
        try:
            return await client.send(broker.nodeId, request)
        except KafkaError as error:
            failure = error
    raise failure


async def _send(producer: Any, records: Iterable[Record], answers: _Answers) -> dict[int, str]:
    """Send all that have no answer yet, each partition in order; returns the refusals."""
    lanes: dict[tuple[str, int], deque[Record]] = {}
    keyless: dict[str, int] = {}  # one partition for all of them: fewer requests
    for each in records:
        if each.place in answers:
            continue
        partitions = sorted(await producer.partitions_for(each.topic))
        if each.key is None:
            partition = keyless.setdefault(each.topic, random.choice(partitions))
        else:
            partition = DefaultPartitioner()(each.key, partitions, partitions)
        lanes.setdefault((each.topic, partition), deque()).append(each)
    work = [_send_lane(producer, *lane, waiting, answers) for lane, waiting in lanes.items()]
    refused: dict[int, str] = {}
    for ended in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(ended, BaseException):
            raise ended
        refused |= ended
    return refused


async def _send_lane(
    producer: Any, topic: str, partition: int, waiting: deque[Record], answers: _Answers
) -> dict[int, str]:
    """Up to the first request that is refused. aiokafka alone would send those after it, too: on a broker
    that does not know the producer yet they would overtake what has to be sent again."""
    while waiting:
        request, inside = producer.create_batch(), []
        while waiting and _append(request, waiting[0]):
            inside.append(waiting.popleft())
        try:
            await asyncio.shield(await producer.send_batch(request, topic, partition=partition))
        except BrokerResponseError as error:
            if error.retriable:
                raise
            refused = {each.place: _text(error) for each in inside}
            if len(refused) == 1:  # nobody else can be the cause
                answers.update(refused)
            return refused
        answers.update({each.place: None for each in inside})
    return {}


def _append(request: Any, record: Record) -> bool:
    """False when it is full; a first record always fits."""
    added = request.append(
        timestamp=record.timestamp_ms, key=record.key, value=record.value, headers=record.headers
    )
    return added is not None


def _text(error: BrokerResponseError) -> str:
    # A broker's answer is a number, of which aiokafka knows the meaning.
    return f"Kafka refused it: {error.message}: {error.args[0] if error.args else error.description}"
