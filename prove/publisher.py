"""Publishes the messages from a process of its own and logs what the broker confirmed, copies included.

python -m prove.publisher BROKER NAME LOG PLAN (a `prove.stage.Plan` as JSON)

Each line of standard input says how many to publish; the rest follows at its end. What a broker did not
confirm before its connection ended is published again.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from uuid import UUID


class Note(NamedTuple):
    """A message that is to be published."""

    id: str
    kind: str
    #: Messages of one key are to be worked on in order. Without keys each has its own.
    key: str

    @property
    def body(self) -> bytes:
        return json.dumps({"id": self.id, "kind": self.kind}).encode()

    @property
    def line(self) -> str:
        return f"{self.id} {self.kind} {self.key}\n"


def notes(plan: dict[str, Any]) -> Iterator[Note]:
    """The messages of a plan, some of them twice."""
    chosen = random.Random(plan["seed"])
    count = plan["messages"]
    special = [kind for kind, times in plan["kinds"].items() for _ in range(times)]
    kinds = dict(zip(chosen.sample(range(count), len(special)), special, strict=True))
    later: list[tuple[int, Note]] = []
    for number in range(count):
        identifier = str(UUID(int=chosen.getrandbits(128), version=4))
        key = f"k{chosen.randrange(plan['keys'])}" if plan["keys"] else identifier
        note = Note(identifier, kinds.get(number, "good"), key)
        yield note
        if chosen.random() < plan["copies"]:
            later.append((number + chosen.randint(*plan["apart"]), note))
            later.sort()
        while later and later[0][0] <= number:
            yield later.pop(0)[1]
    yield from (note for _, note in later)


def as_told(every: Iterator[Note], orders: TextIO) -> Iterator[Note]:
    for line in orders:
        yield from islice(every, int(line))
    yield from every


def rabbitmq(url: str, queue: str, every: Iterator[Note], log: TextIO) -> None:
    import pika
    from pika.exceptions import AMQPError, UnroutableError

    parameters = pika.URLParameters(url)
    parameters.heartbeat = 0  # between two orders this process only waits
    note = next(every, None)
    while note is not None:
        try:
            with pika.BlockingConnection(parameters) as connection:
                channel = connection.channel()
                channel.confirm_delivery()  # publish returns when the broker has confirmed
                while note is not None:
                    properties = pika.BasicProperties(
                        message_id=note.id, delivery_mode=2, headers={"key": note.key}
                    )
                    channel.basic_publish("", queue, note.body, properties, mandatory=True)
                    log.write(note.line)
                    note = next(every, None)
        except UnroutableError:
            raise  # the queue is missing
        except (AMQPError, OSError):  # the broker is away
            time.sleep(0.2)


async def kafka(servers: str, topic: str, every: Iterator[Note], log: TextIO) -> None:
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for note in every:
            key = note.key.encode()
            headers = [("message-id", note.id.encode()), ("key", key)]
            await producer.send_and_wait(topic, note.body, key=key, headers=headers)
            log.write(note.line)
    finally:
        await producer.stop()


def main() -> None:
    broker, name, log, plan = sys.argv[1:]
    every = as_told(notes(json.loads(plan)), sys.stdin)
    with Path(log).open("a", buffering=1) as file:
        if broker.startswith("amqp"):
            rabbitmq(broker, name, every, file)
        else:
            asyncio.run(kafka(broker, name, every, file))


if __name__ == "__main__":
    main()
