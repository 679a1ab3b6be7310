"""Engines: what would break the guarantee is refused, and what only some databases need is set."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import URL, Engine, StaticPool, event, make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from idemq import drivers
from idemq.errors import SetupError

#: Why a SQLite database must be a file.
MEMORY = "a :memory: database or a StaticPool gives all threads one transaction; use a SQLite file"


def parsed(database: str | URL) -> URL:
    """The URL, once at least one of the drivers for its database is known to be installed."""
    try:
        url = make_url(database)
    except Exception:
        raise SetupError("App(url): not a database URL such as postgresql+psycopg://host/db") from None
    if _in_memory(url):
        raise SetupError(MEMORY)
    try:
        drivers.require(drivers.url_for(url, asynchronous=False))
    except SetupError:
        drivers.require(drivers.url_for(url, asynchronous=True))
    return url


def refuse_unsafe(engine: Engine | AsyncEngine) -> None:
    asynchronous = isinstance(engine, AsyncEngine)
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    url = engine.url.set(drivername=f"{engine.dialect.name}+{engine.dialect.driver}")
    if drivers.url_for(url, asynchronous=asynchronous).drivername != url.drivername:
        right = "create_async_engine" if not asynchronous else "create_engine"
        raise SetupError(f"the driver of {url.drivername} needs an engine by {right}")
    if drivers.in_autocommit(sync):
        raise SetupError(
            "the engine's isolation level is AUTOCOMMIT: claim and work would not commit together; "
            "give idemq an engine without it"
        )
    if _in_memory(url) or isinstance(sync.pool, StaticPool):
        raise SetupError(MEMORY)


def _in_memory(url: URL) -> bool:
    named = url.database or ":memory:"
    memory = ":memory:" in named or "mode=memory" in named or url.query.get("mode") == "memory"
    return url.get_backend_name() == "sqlite" and memory


def watch_forks(engine: Engine) -> None:
    """A connection that a forked child inherited is left alone there: two processes would mix its answers."""

    @event.listens_for(engine, "connect")
    def _connect(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["idemq_process"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def _checkout(_connection: object, record: ConnectionPoolEntry, fairy: PoolProxiedConnection) -> None:
        if record.info.setdefault("idemq_process", os.getpid()) != os.getpid():
            record.dbapi_connection = fairy.dbapi_connection = None  # type: ignore[misc]  # SQLAlchemy's recipe for forks sets both; the protocol has them read-only
            raise DisconnectionError("the connection belongs to the process that was forked")


def prepare(engine: Engine) -> None:
    """Settings of our own engines: SQLite with write-ahead log and full durability."""
    watch_forks(engine)
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 30000")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()
