"""The shop whose outbox is under fire. Each process of its relay plans some messages and is then killed.

It is started as `idemq run prove.planned:app --only relay --child` many times, once with `--only
counted`, which counts what arrives: each message leaves one row in `effects`, which no unique key protects.
PROVE_STEP says where the relay is to be killed: see `prove.relayed.STEPS`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from idemq import App, Message, Outbox, embedded, kafka_publisher
from idemq.amqp_confirms import Confirms, Open
from idemq.broker import Destination, Source
from idemq.embedded import Embedded
from idemq.kafka import Kafka
from idemq.outgoing import Messages, Row
from idemq.pumps import MessagePump
from idemq.rabbitmq import RabbitMQ
from prove import controls
from prove.steps import shorten_leases

#: Messages that each process plans, in seconds the longest part of a publish that passes before it is killed.
ROWS, PART = 8, 0.01

DIRECTORY = Path(os.environ["PROVE_DIRECTORY"])
STEP = os.environ.get("PROVE_STEP", "")

shorten_leases()


def where() -> tuple[Any, Source, Destination]:
    url, name = os.environ["PROVE_BROKER"], os.environ["PROVE_NAME"]
    if url.startswith("amqp"):
        rabbit = RabbitMQ(url)
        return rabbit, rabbit.queue(name), rabbit.to(name)
    if url.startswith("/"):
        embedded = Embedded(url)
        return embedded, embedded.queue(name), embedded.to(name)
    kafka = Kafka(url)
    return kafka, kafka.topic(name, group=name), kafka.to(name)


broker, source, destination = where()
app = App(os.environ["PROVE_DATABASE"], brokers=[broker])


@app.consumer("counted", source)
def counted(message: Message, session: Session) -> None:
    session.execute(text("INSERT INTO effects (id) VALUES (:id)"), {"id": (message.body or b"").decode()})


def plan() -> None:
    """Some more messages; half of them have a key, so that they follow each other."""
    assert app.engine is not None
    with app.engine.begin() as connection:
        ids = [str(UUID(int=random.getrandbits(128))) for _ in range(ROWS)]
        for place, each in enumerate(ids):
            Outbox(connection).publish(destination, each.encode(), key=f"k{place % 2}" if place % 2 else None)
    _note("planned", ids)


def _note(file: str, ids: Sequence[str]) -> None:
    with (DIRECTORY / file).open("a") as log:
        log.write("".join(f"{each}\n" for each in ids))


def at(step: str) -> None:
    if step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Wrap what the relay calls."""
    publish, sent, hear = MessagePump._publish, Messages.sent, Open.hear

    def publishing(self: MessagePump, batch: list[Row]) -> list[Row]:
        at("picked")
        vars(self._publisher).setdefault("publish", _watched(self._publisher.publish))
        return publish(self, batch)

    def deleting(self: Messages, connection: Connection, rows: Sequence[Row]) -> None:
        sent(self, connection, rows)
        at("deleted")

    def hearing(self: Open, *arguments: Any) -> None:
        at("unheard")
        hear(self, *arguments)

    for owner, name, wrapper in (
        (MessagePump, "_publish", publishing),
        (Messages, "sent", deleting),
        (Open, "hear", hearing),
        (Confirms, "publish", _soon_killed(Confirms.publish)),
        (kafka_publisher, "_send", _soon_killed(kafka_publisher._send)),
        (embedded.Publisher, "_insert", _soon_killed(embedded.Publisher._insert)),
    ):
        setattr(owner, name, wrapper)


def _soon_killed(send: Callable[..., Any]) -> Callable[..., Any]:
    """What hands messages to a broker; the process is killed at a random moment of it."""

    def sending(*arguments: Any) -> Any:
        if STEP == "publishing" or (STEP == "unheard" and not isinstance(broker, RabbitMQ)):
            killer = threading.Timer(random.uniform(0.0, PART), os.kill, (os.getpid(), signal.SIGKILL))
            killer.start()
            killers.append(killer)
        return send(*arguments)

    return sending


killers: list[threading.Timer] = []


def _watched(publish: Callable[..., list[str | None]]) -> Callable[..., list[str | None]]:
    """It notes what is confirmed before anybody else hears of it."""

    def watched(batch: Sequence[tuple[Any, Message]], timeout: float) -> list[str | None]:
        answers = publish(batch, timeout)
        for killer in killers:
            killer.join()
        bodies = [(message.body or b"").decode() for _, message in batch]
        _note("confirmed", [body for body, why in zip(bodies, answers, strict=True) if why is None])
        at("confirmed")
        return answers

    return watched


controls.apply(os.environ.get("PROVE_CONTROL", ""))
if "relay" in sys.argv:
    install()
    if STEP:
        plan()
