"""What an always-failing message costs: CPU, and the speed of its neighbours. The last part of `make bench`.

One consumer with the default options, so one message at a time, on RabbitMQ and PostgreSQL, in a thread of
this process. Exits with 1 when the message takes 5 % of a core or more, or slows its neighbours by a tenth.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import kombu
import msgspec
from rich.console import Console
from sqlalchemy import URL, create_engine
from sqlalchemy.orm import Session

from benchmarks import brokers
from benchmarks.rounds import database
from benchmarks.sides import running
from benchmarks.work import Payment, Work
from idemq import App
from idemq.broker import Source
from idemq.cli.run import prepare
from idemq.rabbitmq import RabbitMQ
from idemq.worker import Worker
from tests import servers

#: The share of a core, and of the neighbours' speed without it, that is allowed.
MOST_CPU, LEAST_SPEED = 0.05, 0.9

#: Seconds that CPU is measured for: four attempts by the default policy.
WINDOW = 30.0

WARM_UP, MESSAGES = 220, 600


class Failing(Work):
    """A payment of less than nothing never succeeds."""

    attempts = 0

    def handle(self, payment: Payment, session: Session) -> None:
        super().handle(payment, session) if payment.amount >= 0 else self._fail()

    def _fail(self) -> None:
        self.attempts += 1
        raise RuntimeError("never")


def main() -> None:
    console = Console()
    rounds = int(os.environ.get("ROUNDS", "40" if os.environ.get("LONG") == "1" else "16"))
    with ExitStack() as stack:
        try:
            urls = [stack.enter_context(servers.server(name)) for name in ("postgres", "rabbitmq")]
        except servers.Unavailable as reason:
            console.print(f"make bench needs real servers: {reason}")
            sys.exit(1 if servers.required() else 0)
        url = stack.enter_context(database(urls[0]))
        queue, fill = stack.enter_context(brokers.queue(urls[1]))
        work = stack.enter_context(_consumer(RabbitMQ(urls[1]).queue(queue), url))

        def fail() -> None:
            _publish(urls[1], queue, Payment(0, -1, "nobody"))

        _round(work, fill)  # connects, prepares statements
        idle = _cpu(lambda: None)
        failing = _cpu(fail)
        attempts = work.attempts
        ratio = _neighbours(work, fill, fail, rounds)
    result = {"idle": idle, "failing": failing, "attempts": attempts, "speed_beside_it": ratio}
    console.print(f"CPU of a core: {idle:.2%} idle, {failing:.2%} with an always-failing message", end="")
    console.print(f" ({attempts} attempts in {WINDOW:.0f} s)")
    console.print(f"speed of its neighbours: {ratio:.2f} of theirs without it (in {rounds} pairs of turns)")
    home = Path(".bench")
    home.mkdir(exist_ok=True)
    (home / "failing.json").write_text(json.dumps(result, indent=1))
    sys.exit(1 if failing >= MOST_CPU or ratio <= LEAST_SPEED else 0)


@contextmanager
def _consumer(source: Source, url: URL) -> Iterator[Failing]:
    engine, work = create_engine(url), Failing()
    app = App(engine)
    app.consumer("failing", source)(work.handle)
    feeds = prepare(app, list(app.consumers.values()))
    worker = Worker([(feed, app.engine_for(feed.consumer)) for feed in feeds])
    with running(lambda: worker.run(grace=30.0)):
        try:
            yield work
        finally:
            worker.stop()
    engine.dispose()


def _publish(url: str, queue: str, payment: Payment) -> None:
    with kombu.Connection(url) as connection:
        connection.Producer().publish(
            msgspec.json.encode(payment),
            routing_key=queue,
            message_id=str(uuid4()),
            content_type="application/json",
            content_encoding="utf-8",
        )


def _cpu(begin: Callable[[], None]) -> float:
    """The share of a core that this process takes while it does nothing but consume."""
    begin()
    started, used = time.monotonic(), time.process_time()
    time.sleep(WINDOW)
    return (time.process_time() - used) / (time.monotonic() - started)


def _round(work: Work, fill: brokers.Fill) -> float:
    """Seconds for a message."""
    work.meter.arm(WARM_UP, MESSAGES)
    fill(WARM_UP + MESSAGES)
    return work.meter.pace().wall


def _neighbours(work: Work, fill: brokers.Fill, fail: Callable[[], None], rounds: int) -> float:
    """The median of the pairs' ratios; a new failing message for each, while the earlier ones are parked."""
    ratios = []
    for number in range(rounds):
        paces: dict[bool, float] = {}
        for beside in (bool(number % 2), not number % 2):  # each goes first as often
            if beside:
                fail()
            paces[beside] = _round(work, fill)
        ratios.append(paces[False] / paces[True])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
