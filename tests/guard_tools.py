"""A shop whose rows guards work on, with every driver, through Connections and Sessions alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    UniqueConstraint,
    create_engine,
    delete,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.core_tools import DRIVERS
from tests.once_tools import patient

T = TypeVar("T")

CREATED, PAID, SHIPPED = 0, 1, 2


class Base(DeclarativeBase):
    metadata = MetaData()


class Order(Base):
    __tablename__ = "guarded_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str] = mapped_column(String(40))
    shop: Mapped[str | None] = mapped_column(String(40))
    ticket: Mapped[str | None] = mapped_column(String(40))
    state: Mapped[int | None] = mapped_column(default=CREATED)
    version: Mapped[int | None] = mapped_column()
    # The attribute's name is not the column's.
    remark: Mapped[str | None] = mapped_column("note", String(40))
    __table_args__ = (
        UniqueConstraint("number", name="guarded_orders_number"),
        Index("guarded_orders_ticket", "shop", "ticket", unique=True),
    )


class Stock(Base):
    __tablename__ = "guarded_stock"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    num: Mapped[int | None] = mapped_column(Integer)
    note: Mapped[str | None] = mapped_column(String(40))


orders, stock = Base.metadata.tables["guarded_orders"], Base.metadata.tables["guarded_stock"]

#: Connection or Session: what the guards are given.
Lent = Any

EVERY = [(kind, driver, how) for kind, driver in DRIVERS for how in ("connection", "session")]
#: One driver for each database.
SYNC = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql")]
SYNC_CONNECTIONS = [(*pair, "connection") for pair in SYNC]
SYNC_SESSIONS = [(*pair, "session") for pair in SYNC]


@dataclass
class Place:
    """Runs functions of a sync Connection or Session, each in a transaction of its own."""

    engine: Engine
    tested: Engine | AsyncEngine
    how: str
    runner: asyncio.Runner

    @property
    def kind(self) -> str:
        return self.engine.dialect.name

    def __call__(self, work: Callable[[Lent], T]) -> T:
        if isinstance(self.tested, AsyncEngine):
            return self.runner.run(self._run_async(self.tested, work))
        if self.how == "session":
            with Session(self.tested) as session, session.begin():
                return work(session)
        with self.tested.begin() as connection:
            return work(connection)

    async def _run_async(self, engine: AsyncEngine, work: Callable[[Lent], T]) -> T:
        if self.how == "session":
            async with AsyncSession(engine) as session, session.begin():
                return await session.run_sync(work)
        async with engine.begin() as connection:
            return await connection.run_sync(work)

    def put(self, table: Any, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(insert(table).values(values))

    def rows(self, *columns: Any) -> list[Any]:
        with self.engine.connect() as connection:
            query = select(*columns).order_by(columns[0].table.c.id)
            return [row[0] if len(columns) == 1 else tuple(row) for row in connection.execute(query)]

    def close(self) -> None:
        if isinstance(self.tested, AsyncEngine):
            self.runner.run(self.tested.dispose())
        else:
            self.tested.dispose()
        self.runner.close()
        self.engine.dispose()


def on(*places: tuple[str, str, str]) -> pytest.MarkDecorator:
    """Run the test, which takes `place`, with these databases, drivers and targets."""
    return pytest.mark.parametrize(
        "place", places or EVERY, indirect=True, ids=lambda each: "-".join(each).replace(" ", "-")
    )


@pytest.fixture
def place(request: pytest.FixtureRequest, _shared: Callable[[str], URL]) -> Iterator[Place]:
    kind, driver, how = request.param
    url = _shared(kind)
    engine = create_engine(url, pool_size=40)
    patient(engine)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        empty(connection)
    tested_url = url.set(drivername=f"{url.get_backend_name()}+{driver.partition(' ')[0]}")
    tested: Engine | AsyncEngine
    if driver in ("aiosqlite", "psycopg async", "asyncpg", "asyncmy"):
        tested = create_async_engine(tested_url)
        patient(tested.sync_engine)
    else:
        tested = create_engine(tested_url, pool_size=40)
        patient(tested)
    made = Place(engine, tested, how, asyncio.Runner())
    try:
        yield made
    finally:
        made.close()


def empty(connection: Connection) -> None:
    connection.execute(delete(orders))
    connection.execute(delete(stock))
