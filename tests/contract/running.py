"""A worker in a thread of the test, over a database of its own, with a table of effects to count."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, Column, Integer, MetaData, Row, String, Table, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idemq import App, Message, migrate, names, schema
from idemq.broker import Source
from idemq.failures import WAITING
from idemq.lanes import Feed
from idemq.worker import Worker

#: What a handler does when it has written its effect. What it returns is awaited by an async one.
Act = Callable[[Message], Awaitable[None] | None]
#: Something that a handler does to its session, after that.
Sin = Callable[[Message, Session], None]

Make = Callable[..., "Shop"]


@dataclass
class Payment:
    n: int


class Shop:
    """An app whose one consumer writes a row for each message, in a sync or an async handler."""

    effects = Table(
        "effects",
        MetaData(),
        Column("seq", Integer, primary_key=True),
        Column("n", Integer),
        Column("id", String(1000)),
    )

    def __init__(
        self,
        url: URL,
        source: Source,
        kind: str,
        act: Act = lambda message: None,
        *,
        sin: Sin = lambda message, session: None,
        name: str = "shop",
        prepare: bool = True,
        **options: Any,
    ) -> None:
        """`prepare`: make the tables, now."""
        self.app = App(url)
        self.name = name
        decorate = self.app.consumer(name, source, **options)
        insert = self.effects.insert()

        def handle(payment: Payment, message: Message, session: Session) -> None:
            session.execute(insert.values(n=payment.n, id=message.id))
            act(message)
            sin(message, session)

        async def handle_async(payment: Payment, message: Message, session: AsyncSession) -> None:
            await session.execute(insert.values(n=payment.n, id=message.id))
            if inspect.isawaitable(acting := act(message)):
                await acting
            await session.run_sync(lambda sync: sin(message, sync))

        decorate(handle_async if kind == "async" else handle)
        assert self.app.engine is not None
        self.engine = self.app.engine
        if prepare:
            self._prepare()

    def _prepare(self) -> None:
        with self.engine.begin() as connection:
            self.effects.create(connection, checkfirst=True)
        with self.engine.begin() as connection:
            migrate.upgrade(connection)
        with self.engine.begin() as connection:
            self.number = names.register(connection, self.name)

    def worker(self, *others: Shop) -> Worker:
        feeds = []
        for shop in (self, *others):
            declared = shop.app.consumers[shop.name]
            numbers = declared.concurrency, declared.prefetch, shop.number
            engine = shop.app.engine_for(declared.consumer)
            feeds.append((Feed(declared.consumer, declared.source, *numbers), engine))
        return Worker(feeds)

    @contextmanager
    def running(self, *others: Shop, grace: float = 20.0) -> Iterator[Worker]:
        """A started worker, for `others` as well; stopped in order at the end, which must come to an end."""
        worker, started, ended = self.worker(*others), threading.Event(), []
        thread = threading.Thread(target=lambda: ended.append(worker.run(grace, started.set)))
        thread.start()
        assert started.wait(90)
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(grace + 20)
        assert ended == [True]

    def counts(self) -> Counter[str]:
        """How many effects each id has."""
        with self.engine.connect() as connection:
            return Counter(connection.execute(select(self.effects.c.id)).scalars())

    def order(self) -> list[str]:
        """The ids of the effects, in the order in which they were written."""
        with self.engine.connect() as connection:
            return list(connection.scalars(select(self.effects.c.id).order_by(self.effects.c.seq)))

    def dead(self) -> list[tuple[str, bytes]]:
        """Reason and body of each dead letter."""
        failed = schema.table("idemq_failed")
        with self.engine.connect() as connection:
            found = connection.execute(select(failed.c.reason, failed.c.body).order_by(failed.c.seq))
            return [(row.reason, bytes(row.body)) for row in found]

    def failed(self) -> Sequence[Row[Any]]:
        """The rows of what waits and what is dead."""
        failed = schema.table("idemq_failed")
        with self.engine.connect() as connection:
            return connection.execute(select(failed).order_by(failed.c.seq)).all()

    def waiting(self) -> int:
        return sum(row.state == WAITING for row in self.failed())

    def make_due(self) -> None:
        """What waits is due now."""
        failed, past = schema.table("idemq_failed"), datetime(2000, 1, 1, tzinfo=UTC)
        with self.engine.begin() as connection:
            connection.execute(update(failed).where(failed.c.state == WAITING).values(not_before=past))

    def forget(self, until: datetime) -> None:
        """As if pruning had forgotten what was sent `until` then."""
        consumers = schema.table("idemq_consumers")
        with self.engine.begin() as connection:
            connection.execute(update(consumers).where(consumers.c.id == self.number).values(horizon=until))

    def claims(self) -> int:
        processed = schema.table("idemq_processed")
        with self.engine.connect() as connection:
            return len(connection.execute(select(processed.c.id)).all())

    def dispose(self) -> None:
        self.engine.dispose()


def sent(*numbers: int) -> list[tuple[str | None, bytes]]:
    return [(f"m{n}", b'{"n": %d}' % n) for n in numbers]


def once_each(*numbers: int) -> Counter[str]:
    return Counter(f"m{n}" for n in numbers)
