"""`make bench`: idemq beside hand-written loops of the same work, on RabbitMQ and Kafka with PostgreSQL.

Exits with 1 when idemq reaches less than 0.9 of a hand-written loop's messages per second. LONG=1: more and
longer rounds; ONLY=async runs the rows with that word in their names. The figures are left in .bench/.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import brokers, hand, sides
from benchmarks.rounds import Race, check, database
from benchmarks.work import Work
from idemq import kafka, rabbitmq
from tests import servers

#: The share of a hand-written loop's speed that idemq must reach.
GOAL = 0.9
#: Messages at the start of a round that are not measured: a whole prefetch, so that fetching is in the rest.
WARM_UP = 220


def main() -> None:
    console = Console()
    long = os.environ.get("LONG") == "1"
    rounds, messages = (100, 500) if long else (24, 400)
    rounds = int(os.environ.get("ROUNDS", rounds))
    with ExitStack() as stack:
        try:
            urls = [stack.enter_context(servers.server(name)) for name in ("postgres", "rabbitmq", "kafka")]
        except servers.Unavailable as reason:
            console.print(f"make bench needs real servers: {reason}")
            sys.exit(1 if servers.required() else 0)
        url = stack.enter_context(database(urls[0]))
        races = [
            race for race in _races(stack, url, urls[1], urls[2]) if os.environ.get("ONLY", "") in race.name
        ]
        for race in races:
            with console.status(f"{race.name}: {rounds} rounds of {messages} messages"):
                race.run(rounds, WARM_UP, messages)
        engine = create_engine(url)
        check(engine)
        engine.dispose()
    console.print(_table(races))
    home = Path(".bench")
    home.mkdir(exist_ok=True)
    (home / "result.json").write_text(json.dumps([race.as_json() for race in races], indent=1))
    slow = [race.name for race in races if race.paired is not None and race.paired < GOAL]
    if slow:
        console.print(f"below {GOAL} of the hand-written loop: {', '.join(slow)}")
    sys.exit(1 if slow else 0)


def _races(stack: ExitStack, url: URL, rabbit: str, servers: str) -> list[Race]:
    psycopg, asyncpg = (url.set(drivername=f"postgresql+{name}") for name in ("psycopg", "asyncpg"))
    return [
        _rabbitmq(stack, "RabbitMQ sync, psycopg", rabbit, url, None),
        _rabbitmq(stack, "RabbitMQ async, psycopg", rabbit, url, psycopg),
        _kafka(stack, "Kafka sync, psycopg", servers, url, None),
        _kafka(stack, "Kafka async, psycopg", servers, url, psycopg),
        _kafka(stack, "Kafka async, asyncpg", servers, url, asyncpg),
    ]


def _rabbitmq(stack: ExitStack, name: str, broker: str, url: URL, async_url: URL | None) -> Race:
    queue, fill = stack.enter_context(brokers.queue(broker))
    ours = sides.idemq(rabbitmq.RabbitMQ(broker).queue(queue), fill, url, async_url)
    if async_url is not None:  # kombu has no asyncio
        return Race(name, {"idemq": ours, "hand": None})
    queue, fill = stack.enter_context(brokers.queue(broker))
    loop = partial(hand.rabbitmq, broker, queue, create_engine(url), rabbitmq.PREFETCH_PER_LANE)
    return Race(name, {"idemq": ours, "hand": sides.by_hand(loop, fill)})


def _kafka(stack: ExitStack, name: str, broker: str, url: URL, async_url: URL | None) -> Race:
    topic, fill = stack.enter_context(brokers.topic(broker))
    ours = sides.idemq(kafka.Kafka(broker).topic(topic, group=topic), fill, url, async_url)
    topic, fill = stack.enter_context(brokers.topic(broker))
    loop: Callable[[Work], None]
    if async_url is None:
        loop = partial(hand.kafka, broker, topic, topic, create_engine(url), kafka.PREFETCH_PER_LANE)
    else:
        loop = partial(
            hand.kafka_async, broker, topic, topic, create_async_engine(async_url), kafka.PREFETCH_PER_LANE
        )
    return Race(name, {"idemq": ours, "hand": sides.by_hand(loop, fill)})


def _table(races: Sequence[Race]) -> Table:
    table = Table(title="messages per second, and CPU of this process for a message (medians of rounds)")
    for heading in ("", "idemq", "by hand", "ratio", "in pairs", "idemq CPU", "CPU by hand"):
        table.add_column(heading, justify="right" if heading else "left")
    for race in races:
        cells = [_figure(race.per_second(side), "{:,.0f}") for side in ("idemq", "hand")]
        cells += [_figure(ratio, "{:.2f}") for ratio in (race.ratio, race.paired)]
        cells += [_figure(race.cpu(side), "{:,.0f} us") for side in ("idemq", "hand")]
        table.add_row(race.name, *cells)
    return table


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
