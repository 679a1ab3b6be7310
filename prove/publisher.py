"""Publishes the messages from a process of its own and logs what the broker confirmed, copies included.

python -m prove.publisher BROKER NAME LOG MESSAGES PER_SECOND SEED
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO
from uuid import UUID

#: The share of messages that are published twice, and how many others may come between.
COPIES, APART = 0.1, 50


def ids(count: int, seed: int) -> Iterator[str]:
    """`count` ids, a tenth of them twice; the second at most `APART` messages after the first."""
    chosen = random.Random(seed)
    later: list[tuple[int, str]] = []
    for number in range(count):
        identifier = str(UUID(int=chosen.getrandbits(128), version=4))
        yield identifier
        if chosen.random() < COPIES:
            later.append((number + chosen.randint(0, APART), identifier))
        while later and later[0][0] <= number:
            yield later.pop(0)[1]
    yield from (identifier for _, identifier in later)


def as_told(identifiers: Iterator[str], orders: TextIO) -> Iterator[str]:
    for line in orders:
        yield from islice(identifiers, int(line))
    yield from identifiers


def rabbitmq(url: str, queue: str, identifiers: Iterator[str], log: TextIO) -> None:
    import pika

    parameters = pika.URLParameters(url)
    parameters.heartbeat = 0  # between two orders this process only waits
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # publish returns when the broker has confirmed
        for identifier in identifiers:
            properties = pika.BasicProperties(message_id=identifier, delivery_mode=2)
            channel.basic_publish("", queue, _body(identifier), properties, mandatory=True)
            log.write(f"{identifier}\n")


async def kafka(servers: str, topic: str, identifiers: Iterator[str], log: TextIO) -> None:
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for identifier in identifiers:
            headers = [("message-id", identifier.encode())]
            await producer.send_and_wait(topic, _body(identifier), key=identifier.encode(), headers=headers)
            log.write(f"{identifier}\n")
    finally:
        await producer.stop()


def _body(identifier: str) -> bytes:
    return json.dumps({"id": identifier}).encode()


def main() -> None:
    broker, name, log, messages, seed = sys.argv[1:]
    identifiers = as_told(ids(int(messages), int(seed)), sys.stdin)
    with Path(log).open("a", buffering=1) as file:
        if broker.startswith("amqp"):
            rabbitmq(broker, name, identifiers, file)
        else:
            asyncio.run(kafka(broker, name, identifiers, file))


if __name__ == "__main__":
    main()
