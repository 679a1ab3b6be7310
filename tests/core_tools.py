"""One consumer on a real database, run message by message through its unit, sync or async alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from idemq import App, migrate, names, schema
from idemq.attempts import AsyncUnit, SyncUnit
from idemq.broker import Deliver, Subscription
from idemq.declared import Consumer
from idemq.failures import WAITING, Job
from idemq.message import Ack, Message, Verdict
from idemq.parking import Found

#: Every supported pair of database and driver, as parameters of a test that takes `shop`.
DRIVERS = [
    ("sqlite", "pysqlite"),
    ("sqlite", "aiosqlite"),
    ("postgres", "psycopg"),
    ("postgres", "psycopg async"),
    ("postgres", "asyncpg"),
    ("mariadb", "pymysql"),
    ("mariadb", "asyncmy"),
    ("mysql", "pymysql"),
    ("mysql", "asyncmy"),
]

PROCESSED, REPEATED = Ack(), Ack(duplicate=True)

#: Whoever picks parked messages here, if nothing else is said.
OWNER = b"the usual owner."

_metadata = MetaData()
#: What the handlers of these tests write: one row for each effect.
effects = Table(
    "effects",
    _metadata,
    Column("seq", Integer, primary_key=True),
    Column("mark", String(200), nullable=False),
)

#: A handler that is written once and run by sync and async units.
Body = Callable[[Message, Session], object]


def on(*pairs: tuple[str, str], own: bool = False) -> pytest.MarkDecorator:
    """Run the test for these pairs of database and driver, by default for all.

    `own`: the test changes the database itself, so it gets one that nobody else uses.
    """
    return pytest.mark.parametrize(
        "shop",
        [(kind, driver, own) for kind, driver in pairs or DRIVERS],
        indirect=True,
        ids=lambda parameter: f"{parameter[0]}-{parameter[1].replace(' ', '-')}",
    )


class NoSource:
    """A source for consumers that no worker runs."""

    description = "nowhere"
    prefetch_per_lane = 20
    broker: Any = None

    def check(self) -> list[str]:
        raise AssertionError("no worker runs this consumer")

    def orders(self) -> None: ...

    def subscribe(self, consumer: str, deliver: Deliver, prefetch: int) -> Subscription:
        raise AssertionError("no worker runs this consumer")


NOWHERE = NoSource()


def write(message: Message, session: Session) -> None:
    """The usual handler: one effect, marked with the body."""
    session.execute(insert(effects).values(mark=(message.body or b"").decode()))


def message(id: str | None = "1", body: bytes = b"effect", **values: Any) -> Message:
    return Message(id=id, body=body, **values)


@dataclass
class Attempts:
    """A unit of either kind, run from here."""

    consumer: Consumer
    unit: SyncUnit | AsyncUnit
    runner: asyncio.Runner | None
    engine: AsyncEngine | Engine

    def __call__(self, given: Message | Job) -> Verdict:
        job = given if isinstance(given, Job) else self.consumer.job(given)
        if isinstance(self.unit, SyncUnit):
            return self.unit.run(job)
        assert self.runner is not None
        return self.runner.run(self.unit.run(job))

    def look(self, owner: bytes = OWNER, count: int = 10, **how: bool) -> list[Job]:
        """Pick parked messages that are due."""
        if isinstance(self.unit, SyncUnit):
            found = self.unit.look(owner, count, **how)
        else:
            assert self.runner is not None
            found = self.runner.run(self.unit.look(owner, count, **how))
        assert isinstance(found, Found), found
        return found.jobs

    def again(self, owner: bytes = OWNER, count: int = 10, **how: bool) -> list[Verdict]:
        """Pick parked messages that are due, and run them."""
        return [self(job) for job in self.look(owner, count, **how)]

    def give_back(self, owner: bytes = OWNER) -> None:
        if isinstance(self.unit, SyncUnit):
            self.unit.lease(owner)
        else:
            assert self.runner is not None
            self.runner.run(self.unit.lease(owner))

    def close(self) -> None:
        if isinstance(self.unit, SyncUnit):
            self.unit.close()
        else:
            assert self.runner is not None
            assert isinstance(self.engine, AsyncEngine)
            self.runner.run(self.unit.close())
            self.runner.run(self.engine.dispose())
            self.runner.close()


@dataclass
class Shop:
    """An empty database with idemq's tables and `effects`, and the driver under test."""

    url: URL
    driver: str
    engine: Engine
    opened: list[Attempts] = field(default_factory=list)

    @property
    def asynchronous(self) -> bool:
        return self.driver in ("aiosqlite", "psycopg async", "asyncpg", "asyncmy")

    @property
    def kind(self) -> str:
        return self.url.get_backend_name()

    def url_of_driver(self) -> URL:
        return self.url.set(drivername=f"{self.kind}+{self.driver.partition(' ')[0]}")

    def new_engine(self, **options: Any) -> Engine | AsyncEngine:
        if self.asynchronous:
            engine = create_async_engine(self.url_of_driver(), **options)
            _patient(engine.sync_engine)
            return engine
        sync = create_engine(self.url_of_driver(), **options)
        _patient(sync)
        return sync

    def consumer(self, body: Body = write, name: str = "shop", **options: Any) -> Consumer:
        engine = self.new_engine()
        app = App(engine)

        def handler(message: Message, session: Session) -> object:
            return body(message, session)

        async def async_handler(message: Message, session: AsyncSession) -> object:
            return await session.run_sync(lambda sync: body(message, sync))

        app.consumer(name, NOWHERE, **options)(async_handler if self.asynchronous else handler)
        return app.consumers[name].consumer

    def number(self, name: str = "shop") -> int:
        with self.engine.begin() as connection:
            return names.register(connection, name)

    def attempts(
        self,
        body: Body = write,
        name: str = "shop",
        *,
        engine: Engine | AsyncEngine | None = None,
        consumer: Consumer | None = None,
        trigger: bool = False,
        apart: bool = False,
        **options: Any,
    ) -> Attempts:
        """A unit for a new consumer with `body` as its handler."""
        consumer = consumer or self.consumer(body, name, **options)
        engine = engine or self.new_engine()
        number = self.number(name)
        unit: SyncUnit | AsyncUnit
        if isinstance(engine, AsyncEngine):
            runner = asyncio.Runner()
            unit = AsyncUnit(engine, consumer, number, trigger=trigger, apart=apart)
        else:
            runner, unit = None, SyncUnit(engine, consumer, number, trigger=trigger)
        attempts = Attempts(consumer, unit, runner, engine)
        self.opened.append(attempts)
        return attempts

    def effects(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(effects.c.mark).order_by(effects.c.seq)))

    def claims(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(schema.table("idemq_processed"))) or 0

    def dead(self) -> Sequence[Row[Any]]:
        table = schema.table("idemq_failed")
        with self.engine.connect() as connection:
            return connection.execute(select(table).order_by(table.c.seq)).all()

    def change_rows(self, **values: Any) -> None:
        """Change what all parked messages and dead letters say."""
        with self.engine.begin() as connection:
            connection.execute(update(schema.table("idemq_failed")).values(values))

    def time_passes(self) -> None:
        """Every parked message is due, and every lease has ended."""
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)
        table = schema.table("idemq_failed")
        with self.engine.begin() as connection:
            connection.execute(
                update(table)
                .where(table.c.state == WAITING)
                .values(not_before=long_ago, lease_until=long_ago)
            )

    def reasons(self) -> list[str]:
        return [row.reason for row in self.dead()]


def unpacked(column: bytes) -> Any:
    return msgspec.msgpack.decode(column)


def _patient(engine: Engine) -> None:
    """These machines are slow: SQLite waits longer for a lock than it does by default."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 60000")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()


@contextmanager
def open_shop(url: URL, driver: str) -> Iterator[Shop]:
    engine = create_engine(url, pool_size=20)
    _patient(engine)
    with engine.begin() as connection:
        migrate.upgrade(connection)
        _metadata.create_all(connection)
        for table in [*reversed(schema.metadata.sorted_tables), effects]:
            connection.execute(delete(table))
    shop = Shop(url, driver, engine)
    try:
        yield shop
    finally:
        for attempts in shop.opened:
            attempts.close()
        for attempts in shop.opened:  # after all of them, because units may share an engine
            if isinstance(attempts.engine, Engine):
                attempts.engine.dispose()
        engine.dispose()
