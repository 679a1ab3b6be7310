"""`make bench`: idemq beside hand-written loops of the same work, on RabbitMQ and Kafka with PostgreSQL.

Exits with 1 when idemq reaches less than 0.9 of a hand-written loop's messages per second. LONG=1: more and
longer rounds; ONLY=async runs the rows with that word in their names. The figures are left in .bench/.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import hand, ours
from benchmarks.brokers import filled_queue, filled_topic
from benchmarks.rounds import Race, database
from benchmarks.work import Meter, Pace, Work
from idemq.app import PREFETCH_PER_LANE
from idemq.kafka import Kafka
from idemq.rabbitmq import RabbitMQ
from tests import servers

#: The share of a hand-written loop's speed that idemq must reach.
GOAL = 0.9
WARM_UP = 100
#: More messages than are measured, so that neither side waits for an empty queue at the end.
SPARE = 50


def main() -> None:
    console = Console()
    long = os.environ.get("LONG") == "1"
    rounds, messages = (31, 2000) if long else (11, 500)
    rounds = int(os.environ.get("ROUNDS", rounds))
    with ExitStack() as stack:
        try:
            urls = [stack.enter_context(servers.server(name)) for name in ("postgres", "rabbitmq", "kafka")]
        except servers.Unavailable as reason:
            console.print(f"make bench needs real servers: {reason}")
            sys.exit(1 if servers.required() else 0)
        url = stack.enter_context(database(urls[0]))
        topic = stack.enter_context(filled_topic(urls[2], WARM_UP + messages + SPARE))
        engine = create_engine(url)
        races = _rabbitmq(urls[1], url, engine, messages) + _kafka(urls[2], topic, url, engine, messages)
        races = [race for race in races if os.environ.get("ONLY", "") in race.name]
        for race in races:
            with console.status(f"{race.name}: {rounds} rounds of {messages} messages"):
                race.run(engine, rounds, WARM_UP + messages)
            if console.is_terminal:
                console.print(_table([race]))
        engine.dispose()
    console.print(_table(races))
    home = Path(".bench")
    home.mkdir(exist_ok=True)
    (home / "result.json").write_text(json.dumps([race.as_json() for race in races], indent=1))
    slow = [race.name for race in races if race.ratio is not None and race.ratio < GOAL]
    if slow:
        console.print(f"below {GOAL} of the hand-written loop: {', '.join(slow)}")
    sys.exit(1 if slow else 0)


def _measured(loop: Any, messages: int) -> Pace:
    """One round of a hand-written loop, which gets the work and ends when its meter is full."""
    work = Work()
    work.meter = Meter(WARM_UP, messages, lambda: None)
    loop(work=work, prefetch=PREFETCH_PER_LANE)
    return work.meter.pace


def _rabbitmq(broker: str, url: URL, engine: Engine, messages: int) -> list[Race]:
    def by_idemq(*, asynchronous: bool) -> Pace:
        with filled_queue(broker, WARM_UP + messages + SPARE) as queue:
            source = RabbitMQ(broker).queue(queue)
            other = create_async_engine(url) if asynchronous else None
            return ours.consume(engine, source, WARM_UP, messages, other)

    def by_hand() -> Pace:
        with filled_queue(broker, WARM_UP + messages + SPARE) as queue:
            return _measured(partial(hand.rabbitmq, broker, queue, engine), messages)

    return [
        Race("RabbitMQ sync, psycopg", partial(by_idemq, asynchronous=False), by_hand),
        Race("RabbitMQ async, psycopg", partial(by_idemq, asynchronous=True), None),
    ]


def _kafka(broker: str, topic: str, url: URL, engine: Engine, messages: int) -> list[Race]:
    def group() -> str:
        return f"bench-{uuid4().hex[:12]}"

    def by_idemq(driver: str | None) -> Pace:
        source = Kafka(broker).topic(topic, group=group())
        other = create_async_engine(url.set(drivername=driver)) if driver else None
        return ours.consume(engine, source, WARM_UP, messages, other)

    def by_hand(driver: str | None) -> Pace:
        if driver is None:
            return _measured(partial(hand.kafka, broker, topic, group(), engine), messages)
        other = create_async_engine(url.set(drivername=driver))
        return _measured(partial(hand.kafka_async, broker, topic, group(), other), messages)

    drivers = {
        "Kafka sync, psycopg": None,
        "Kafka async, psycopg": "postgresql+psycopg",
        "Kafka async, asyncpg": "postgresql+asyncpg",
    }
    return [
        Race(name, partial(by_idemq, driver), partial(by_hand, driver)) for name, driver in drivers.items()
    ]


def _table(races: Sequence[Race]) -> Table:
    table = Table(title="messages per second, and CPU of this process for a message (medians of rounds)")
    for heading in ("", "idemq", "by hand", "ratio", "idemq CPU", "CPU by hand"):
        table.add_column(heading, justify="right" if heading else "left")
    for race in races:
        cells = [_figure(race.per_second(side), "{:,.0f}") for side in ("idemq", "hand")]
        cells += [_figure(race.ratio, "{:.2f}")]
        cells += [_figure(race.cpu(side), "{:,.0f} us") for side in ("idemq", "hand")]
        table.add_row(race.name, *cells)
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
