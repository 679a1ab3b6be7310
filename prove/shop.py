"""The application under fire. Each message leaves one row in `effects`, which no unique key protects.

A message's kind says what its handler does: `good`; `failing` (raises twice, after its work); `rejected`;
`exits` (ends the process after its work); `garbled` (ends the process in the payload's decoder); `flagged`
(rejected while there is a file `flag`). What it runs on comes from the environment, because it is started as
`idemq run prove.shop:app` many times.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import Retrying, stop_after_attempt, wait_random

from idemq import App, Reject
from idemq.broker import Source
from idemq.kafka import Kafka
from idemq.rabbitmq import RabbitMQ
from prove import controls

DIRECTORY = Path(os.environ["PROVE_DIRECTORY"])

#: In order by the header `key`, and as quick as the servers allow to notice who is frozen.
ORDERED = bool(os.environ.get("PROVE_ORDERED"))

#: Some of these waits are spent in the worker, and some are parked.
RETRY = Retrying(stop=stop_after_attempt(10), wait=wait_random(0, 2.5))


def source() -> Source:
    broker, name = os.environ["PROVE_BROKER"], os.environ["PROVE_NAME"]
    if broker.startswith("amqp"):
        if ORDERED:
            return RabbitMQ(broker, heartbeat=1).queue(name, arguments={"x-single-active-consumer": True})
        return RabbitMQ(broker).queue(name)
    return Kafka(broker).topic(name, group=name, session_timeout=6 if ORDERED else 10)


class Busy:
    """A file with one byte for each thread, 1 while its handler runs: shows afterwards what a kill hit."""

    def __init__(self) -> None:
        self._file = os.open(DIRECTORY / f"{os.getpid()}.busy", os.O_CREAT | os.O_WRONLY)
        self._offsets: dict[int, int] = {}

    def set(self, value: bytes) -> None:
        offset = self._offsets.setdefault(threading.get_ident(), len(self._offsets))
        os.pwrite(self._file, value, offset)


app = App(os.environ["PROVE_DATABASE"])
busy = Busy()
controls.apply(os.environ.get("PROVE_CONTROL", ""))


@dataclass
class Work:
    id: UUID
    kind: str = "good"

    def __post_init__(self) -> None:
        if self.kind == "garbled":
            os._exit(70)


@app.consumer(
    "prove",
    source(),
    concurrency=4 if ORDERED else 2,
    retry=RETRY,
    max_crashes=int(os.environ.get("PROVE_MAX_CRASHES", "20")),
    ordered=ORDERED,
    key="key" if ORDERED else None,
)
def work(payload: Work, session: Session) -> None:
    busy.set(b"1")
    try:
        session.execute(text("INSERT INTO effects (id, worker) VALUES (:id, :worker)"), _row(payload))
        time.sleep(random.uniform(0, 0.008))  # work that takes a moment, so that kills fall into it
        _behave(payload)
    finally:
        busy.set(b"0")


def _behave(payload: Work) -> None:
    match payload.kind:
        case "failing":
            if _fails(payload.id):
                raise RuntimeError("not yet")
        case "rejected":
            raise Reject("as it must be")
        case "exits":
            os._exit(70)
        case "flagged":
            if (DIRECTORY / "flag").exists():
                raise Reject("the flag is up")


def _fails(identifier: UUID) -> bool:
    """Twice for each message, whichever processes have it: files remember."""
    for number in (1, 2):
        try:
            (DIRECTORY / f"{identifier}.{number}").touch(exist_ok=False)
            return True
        except FileExistsError:
            continue
    return False


def _row(payload: Work) -> dict[str, object]:
    return {"id": payload.id, "worker": os.getpid()}
