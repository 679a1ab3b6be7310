"""A worker in a thread of the test, over a database of its own, with a table of effects to count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Column, Integer, MetaData, String, Table, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idemq import App, Message, migrate, names, schema
from idemq.broker import Source
from idemq.lanes import Feed
from idemq.worker import Worker

#: What a handler does beside writing its effect; called with the message before the effect is written.
Act = Callable[[Message], None]


@dataclass
class Payment:
    n: int


class Shop:
    """An app whose one consumer writes a row for each message, in a sync or an async handler."""

    effects = Table("effects", MetaData(), Column("n", Integer), Column("id", String(1000)))

    def __init__(
        self,
        url: URL,
        source: Source,
        kind: str,
        act: Act = lambda message: None,
        *,
        prepare: bool = True,
        **options: Any,
    ) -> None:
        """`prepare`: make the tables, now."""
        self.app = App(url)
        decorate = self.app.consumer("shop", source, **options)
        insert = self.effects.insert()

        def handle(payment: Payment, message: Message, session: Session) -> None:
            act(message)
            session.execute(insert.values(n=payment.n, id=message.id))

        async def handle_async(payment: Payment, message: Message, session: AsyncSession) -> None:
            act(message)
            await session.execute(insert.values(n=payment.n, id=message.id))

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
            self.number = names.register(connection, "shop")

    def worker(self) -> Worker:
        declared = self.app.consumers["shop"]
        feed = Feed(declared.consumer, declared.source, declared.concurrency, declared.prefetch, self.number)
        return Worker([(feed, self.app.engine_for(declared.consumer))])

    @contextmanager
    def running(self, grace: float = 20.0) -> Iterator[Worker]:
        """A started worker; stopped in order at the end, which must come to an end."""
        worker, started, ended = self.worker(), threading.Event(), []
        thread = threading.Thread(target=lambda: ended.append(worker.run(grace, started.set)))
        thread.start()
        assert started.wait(30)
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

    def dead(self) -> list[tuple[str, bytes]]:
        """Reason and body of each dead letter."""
        failed = schema.table("idemq_failed")
        with self.engine.connect() as connection:
            found = connection.execute(select(failed.c.reason, failed.c.body).order_by(failed.c.seq))
            return [(row.reason, bytes(row.body)) for row in found]

    def claims(self) -> int:
        processed = schema.table("idemq_processed")
        with self.engine.connect() as connection:
            return len(connection.execute(select(processed.c.id)).all())

    def dispose(self) -> None:
        self.engine.dispose()
