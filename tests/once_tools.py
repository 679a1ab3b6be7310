"""One way to call `once` for every kind of target, so that a test is written once for all of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    MetaData,
    String,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import migrate, once, schema
from idemq.work import Work
from tests.conftest import _server


class Base(DeclarativeBase):
    metadata = MetaData()


class Effect(Base):
    __tablename__ = "effects"
    seq: Mapped[int] = mapped_column(primary_key=True)
    mark: Mapped[str] = mapped_column(String(200), unique=True)


effects = Base.metadata.tables["effects"]

#: (fixture's database, SQLAlchemy driver), sync and async.
SYNC = [("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"), ("mysql", "pymysql")]
ASYNC = [
    ("sqlite", "aiosqlite"),
    ("postgres", "psycopg"),
    ("postgres", "asyncpg"),
    ("mariadb", "asyncmy"),
    ("mysql", "asyncmy"),
]
#: What is given to `once`: `open` means that the caller's transaction has begun before the block.
TARGETS = ["engine", "session", "session open", "connection", "connection open"]
EVERY = [(database, f"{driver} {target}") for database, driver in SYNC for target in TARGETS] + [
    (database, f"{driver} async {target}") for database, driver in ASYNC for target in TARGETS
]
BORROWED = [(database, how) for database, how in EVERY if not how.endswith("engine")]

#: What is done in a fresh block; the Session is there for `work.session` and for borrowed ones.
Do = Callable[[Work, Connection, Session | None], object]


def on(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "how"), pairs or EVERY, ids=lambda value: value.replace(" ", "-"))


def mark(text: str = "effect") -> Do:
    def do(_work: Work, connection: Connection, session: Session | None) -> None:
        if session is not None:
            session.add(Effect(mark=text))  # flushed by nobody but the block's end
        else:
            connection.execute(insert(effects).values(mark=text))

    return do


def patient(engine: Engine) -> None:
    """These machines are slow: SQLite waits longer for its lock than it does by default."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 60000")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()


@dataclass
class Caller:
    """Calls `once` like a user would, with one kind of target."""

    url: URL
    how: str
    engine: Engine
    runner: asyncio.Runner | None
    tested: Engine | AsyncEngine

    def __call__(self, identifier: str, do: Do | None = None, **options: Any) -> tuple[bool, Any]:
        """Whether it was fresh, and `work.result` after the block. `do` defaults to one effect."""
        do = do or mark()
        if isinstance(self.tested, AsyncEngine):
            assert self.runner is not None
            return self.runner.run(self._call_async(self.tested, identifier, do, options))
        return self._call(self.tested, identifier, do, options)

    def _call(self, engine: Engine, identifier: str, do: Do, options: dict[str, Any]) -> tuple[bool, Any]:
        if self.how.endswith("engine"):
            with once(engine, "shop", identifier, **options) as work:
                if work.fresh:
                    do(work, work.connection, work.session)
            return work.fresh, work.result
        if "session" in self.how:
            with Session(engine) as session:
                self._before(session.connection() if "open" in self.how else None)
                with once(session, "shop", identifier, **options) as lent:
                    if lent.fresh:
                        do(lent, session.connection(), session)
                session.commit()
            return lent.fresh, lent.result
        with engine.connect() as connection:
            self._before(connection if "open" in self.how else None)
            with once(connection, "shop", identifier, **options) as lent:
                if lent.fresh:
                    do(lent, connection, None)
            connection.commit()
        return lent.fresh, lent.result

    async def _call_async(
        self, engine: AsyncEngine, identifier: str, do: Do, options: dict[str, Any]
    ) -> tuple[bool, Any]:
        if self.how.endswith("engine"):
            async with once(engine, "shop", identifier, **options) as work:
                if work.fresh:
                    sync = work.session.sync_session
                    await work.connection.run_sync(lambda connection: do(work, connection, sync))
            return work.fresh, work.result
        if "session" in self.how:
            async with AsyncSession(engine) as session:
                if "open" in self.how:
                    await session.run_sync(lambda sync: self._before(sync.connection()))
                async with once(session, "shop", identifier, **options) as lent:
                    if lent.fresh:
                        await session.run_sync(lambda sync: do(lent, sync.connection(), sync))
                await session.commit()
            return lent.fresh, lent.result
        async with engine.connect() as connection:
            if "open" in self.how:
                await connection.run_sync(self._before)
            async with once(connection, "shop", identifier, **options) as lent:
                if lent.fresh:
                    await connection.run_sync(lambda sync: do(lent, sync, None))
            await connection.commit()
        return lent.fresh, lent.result

    def _before(self, connection: Connection | None) -> None:
        if connection is not None:
            connection.execute(select(effects.c.mark)).all()

    @property
    def asynchronous(self) -> bool:
        return self.runner is not None

    def effects(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(effects.c.mark).order_by(effects.c.seq)))

    def claims(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(schema.table("idemq_processed"))) or 0

    def close(self) -> None:
        if self.runner is not None:
            assert isinstance(self.tested, AsyncEngine)
            self.runner.run(self.tested.dispose())
            self.runner.close()
        elif isinstance(self.tested, Engine):
            self.tested.dispose()


@contextmanager
def prepared(url: URL, *, strict: bool = False) -> Iterator[Engine]:
    """An engine on a database with idemq's tables and `effects`."""
    engine = create_engine(url, pool_size=20)
    patient(engine)
    with engine.begin() as connection:
        migrate.upgrade(connection, strict=strict)
        Base.metadata.create_all(connection)
    try:
        yield engine
    finally:
        engine.dispose()


def make_caller(url: URL, how: str, engine: Engine, **options: Any) -> Caller:
    driver = how.partition(" ")[0]
    full = url.set(drivername=f"{url.get_backend_name()}+{driver}")
    if " async " in how:
        async_engine = create_async_engine(full, **options)
        patient(async_engine.sync_engine)
        return Caller(url, how, engine, asyncio.Runner(), async_engine)
    tested = create_engine(full, **options)
    patient(tested)
    return Caller(url, how, engine, None, tested)


@pytest.fixture(scope="module")
def databases(
    _running: tuple[ExitStack, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[URL, Engine]]]:
    """A prepared database of each kind for all tests of a module, made when first asked for."""
    made: dict[str, tuple[URL, Engine]] = {}
    with ExitStack() as stack:

        def database(kind: str) -> tuple[URL, Engine]:
            if kind not in made:
                url = (
                    make_url(f"sqlite:///{tmp_path_factory.mktemp('once') / 'test.db'}")
                    if kind == "sqlite"
                    else stack.enter_context(own_database(kind, _server(kind, _running)))
                )
                made[kind] = url, stack.enter_context(prepared(url))
            return made[kind]

        yield database


@contextmanager
def own_database(kind: str, server: str) -> Iterator[URL]:
    admin = make_url(server)
    name = f"t{uuid.uuid4().hex[:12]}"
    engine = create_engine(admin, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield admin.set(database=name)
    finally:
        with engine.connect() as connection:
            force = " WITH (FORCE)" if kind == "postgres" else ""
            connection.execute(text(f"DROP DATABASE {name}{force}"))
        engine.dispose()


@pytest.fixture
def caller(databases: Callable[[str], tuple[URL, Engine]], kind: str, how: str) -> Iterator[Caller]:
    """For tests with the mark `on(...)`."""
    url, engine = databases(kind)
    with engine.begin() as connection:
        connection.execute(delete(effects))
        connection.execute(delete(schema.table("idemq_processed")))
    made = make_caller(url, how, engine)
    try:
        yield made
    finally:
        made.close()
