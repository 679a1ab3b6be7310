"""The application under fire. Each message leaves one row in `effects`, which no unique key protects.

What it runs on comes from the environment, because it is started as `idemq run prove.shop:app` many times.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from idemq import App
from idemq.broker import Source
from idemq.kafka import Kafka
from idemq.rabbitmq import RabbitMQ
from prove import controls


def source() -> Source:
    broker, name = os.environ["PROVE_BROKER"], os.environ["PROVE_NAME"]
    if broker.startswith("amqp"):
        return RabbitMQ(broker).queue(name)
    return Kafka(broker).topic(name, group=name)


class Busy:
    """A file with one byte for each thread, 1 while its handler runs: shows afterwards what a kill hit."""

    def __init__(self, directory: str) -> None:
        path = os.path.join(directory, f"{os.getpid()}.busy")
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY)
        self._offsets: dict[int, int] = {}

    def set(self, value: bytes) -> None:
        offset = self._offsets.setdefault(threading.get_ident(), len(self._offsets))
        os.pwrite(self._file, value, offset)


app = App(os.environ["PROVE_DATABASE"])
busy = Busy(os.environ["PROVE_DIRECTORY"])
controls.apply(os.environ.get("PROVE_CONTROL", ""))


@dataclass
class Work:
    id: UUID


@app.consumer("prove", source(), concurrency=2)
def work(payload: Work, session: Session) -> None:
    busy.set(b"1")
    session.execute(text("INSERT INTO effects (id, worker) VALUES (:id, :worker)"), _row(payload))
    time.sleep(random.uniform(0, 0.008))  # work that takes a moment, so that kills fall into it
    busy.set(b"0")


def _row(payload: Work) -> dict[str, object]:
    return {"id": payload.id, "worker": os.getpid()}
