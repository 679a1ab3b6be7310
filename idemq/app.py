"""`App`: the consumers of one application over one database, declared; mistakes raise here and now."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Never, TypeVar
from uuid import UUID

from sqlalchemy import URL, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from tenacity import BaseRetrying

from idemq import drivers
from idemq.broker import Source
from idemq.declared import Consumer, fingerprint_by
from idemq.errors import SetupError
from idemq.failures import MAX_KEPT
from idemq.handlers import Handler, read
from idemq.ledger import WAIT
from idemq.message import Message
from idemq.options import check
from idemq.retry import policy
from idemq.sessions import Maker, Sessions

Function = TypeVar("Function", bound=Callable[..., Any])

#: Why a SQLite database must be a file.
MEMORY = "a :memory: database or a StaticPool gives all threads one transaction; use a SQLite file"

#: Options that the path of a message knows under the same name.
_PASSED = ("wait", "strict", "deadline", "max_crashes", "undated", "max_kept")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Declared:
    """A consumer as it was declared."""

    consumer: Consumer
    source: Source
    concurrency: int
    prefetch: int
    known_as: tuple[str, ...]


class App:
    """Consumers over one database.

    `database` is a URL, a sync Engine or an AsyncEngine; with both kinds of handlers give both engines, or a
    URL whose database has drivers of both kinds installed. `session` is a sessionmaker of yours, whose
    options and class are kept. `schema` is the database schema of idemq's tables (default: the
    connection's). Raises `SetupError` for whatever would break the guarantee.
    """

    def __init__(
        self,
        database: str | URL | Engine | AsyncEngine,
        async_engine: AsyncEngine | None = None,
        *,
        session: Maker | None = None,
        schema: str | None = None,
    ) -> None:
        if schema is not None and not _IDENTIFIER.match(schema):
            raise SetupError(f"schema={schema!r}: not a plain identifier (letters, digits, underscore)")
        self.schema = schema
        self.sessions = Sessions(session)
        self.consumers: dict[str, Declared] = {}
        self._url: URL | None = None
        self._engine: Engine | None = None
        self._async_engine = async_engine
        if isinstance(database, AsyncEngine):
            if async_engine is not None:
                raise SetupError("App(engine, async_engine): the first of two engines must be a sync Engine")
            self._async_engine = database
        elif isinstance(database, Engine):
            self._engine = database
        else:
            self._url = _parsed(database)
        for engine in (self._engine, self._async_engine):
            if engine is not None:
                _refuse_unsafe(engine)
                _watch_forks(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)

    @property
    def engine(self) -> Engine | None:
        """The sync engine, from a URL made when first asked for; None when there is no driver for it."""
        if self._engine is None and self._url is not None and self._installed(asynchronous=False):
            self._engine = create_engine(drivers.url_for(self._url, asynchronous=False), max_overflow=-1)
            _refuse_unsafe(self._engine)
            _prepare(self._engine)
        return self._engine

    @property
    def async_engine(self) -> AsyncEngine | None:
        """The async engine, from a URL made when first asked for; None when there is no driver for it."""
        if self._async_engine is None and self._url is not None and self._installed(asynchronous=True):
            url = drivers.url_for(self._url, asynchronous=True)
            self._async_engine = create_async_engine(url, max_overflow=-1)
            _refuse_unsafe(self._async_engine)
            _prepare(self._async_engine.sync_engine)
        return self._async_engine

    def _installed(self, *, asynchronous: bool) -> bool:
        assert self._url is not None
        try:
            drivers.require(drivers.url_for(self._url, asynchronous=asynchronous))
        except SetupError:
            return False
        return True

    def engine_for(self, consumer: Consumer) -> Engine | AsyncEngine:
        """The engine that runs the consumer's handler."""
        engine = self.async_engine if consumer.handler.asynchronous else self.engine
        assert engine is not None  # the declaration checked it
        return engine

    def consumer(
        self,
        name: str,
        source: Source,
        *,
        id: str | Sequence[str] | Callable[[Message], str | UUID | None] | None = None,
        fingerprint: Callable[[Message], bytes | str] | bool | None = True,
        concurrency: int = 1,
        prefetch: int | None = None,
        wait: float = WAIT,
        strict: bool = False,
        known_as: str | Sequence[str] = (),
        retry: BaseRetrying | None = None,
        deadline: float | None = None,
        max_crashes: int = 3,
        undated: Literal["run", "park"] = "run",
        max_kept: int = MAX_KEPT,
        **unknown: Never,
    ) -> Callable[[Function], Function]:
        """Declare the decorated function as the handler of `source`; it is given back unchanged.

        `name` scopes the message ids: two consumers never share them, and renaming one needs
        `known_as="old name"`. `id` is a header name, several to try in order, or a function of the message;
        by default the broker's own message id, then CloudEvents, then the usual header names.
        `fingerprint` tells a repeat from another message with the same id: by default the body's digest; a
        function of the message where bodies differ from attempt to attempt; None to compare nothing.
        `concurrency`: messages worked on at a time in each process. `prefetch`: unsettled deliveries at a
        time, 1 to 1,000. `wait`: seconds that a repeat waits for its twin in flight. `strict`: notice also
        a rollback through the driver that is followed by more work, for one more round trip.

        `retry` is a `tenacity.Retrying`, of which `stop`, `wait` and `retry` are used; by default twelve
        tries in about five hours, and four in about eleven seconds for a bug such as a TypeError. What waits
        longer than a second is parked in the database. `deadline`: seconds that a handler may run; an async
        one is cancelled, a sync one is not committed, and its process ends 10 s later if it still runs.
        `max_crashes`: how often a message may end a process in which it runs alone. `undated`: whether a
        message that does not say when it was sent is run, or becomes a dead letter ("park").
        `max_kept`: the largest message, in bytes, that is parked or made a dead letter; one that is larger
        stops the consumer instead.
        """
        given = {
            "id": id,
            "fingerprint": fingerprint,
            "concurrency": concurrency,
            "prefetch": prefetch,
            "wait": wait,
            "strict": strict,
            "known_as": known_as,
            "retry": retry,
            "deadline": deadline,
            "max_crashes": max_crashes,
            "undated": undated,
            "max_kept": max_kept,
        }
        check(name, unknown, given)
        self._check_name(name)
        if not hasattr(source, "subscribe"):
            raise SetupError(f"consumer {name!r}: {source!r} is no source such as broker.queue(...)")
        return partial(self._declare, name, source, given)

    def _declare(self, name: str, source: Source, given: dict[str, Any], function: Function) -> Function:
        self._check_name(name)
        options: dict[str, Any] = {option: given[option] for option in _PASSED}
        if given["fingerprint"] is not True:
            options["fingerprint"] = fingerprint_by(name, given["fingerprint"])
        rule, before, concurrency = given["id"], given["known_as"], given["concurrency"]
        consumer = Consumer(
            name=name,
            handler=self._handler(name, function),
            id=(rule,) if isinstance(rule, str) else rule,
            policy=policy(name, given["retry"]),
            schema=self.schema,
            sessions=self.sessions,
            parks=True,
            **options,
        )
        ahead = given["prefetch"] or min(1000, source.prefetch_per_lane * concurrency)
        names = (before,) if isinstance(before, str) else tuple(before)
        self.consumers[name] = Declared(consumer, source, concurrency, ahead, names)
        return function

    def _check_name(self, name: str) -> None:
        if name in self.consumers:
            raise SetupError(f"consumer {name!r} is declared twice; names scope the ids and must differ")

    def _handler(self, name: str, function: Callable[..., Any]) -> Handler:
        handler = read(function, name)
        self._require_engine(name, handler.asynchronous)
        for wanted in handler.session_classes:
            if not self.sessions.provides(wanted):
                raise SetupError(
                    f"consumer {name!r}: session= does not make the {wanted.__name__} that it asks for"
                )
        return handler

    def _require_engine(self, name: str, asynchronous: bool) -> None:
        if (self.async_engine if asynchronous else self.engine) is not None:
            return
        kind = "async" if asynchronous else "sync"
        if self._url is not None:
            try:
                drivers.require(drivers.url_for(self._url, asynchronous=asynchronous))
            except SetupError as error:
                raise SetupError(f"consumer {name!r}: its {kind} handler needs a driver: {error}") from None
        other = "App(engine, async_engine)" if asynchronous else "App(engine)"
        raise SetupError(
            f"consumer {name!r}: its handler is {kind}, but the app has no {kind} engine: {other}"
        )


def _parsed(database: str | URL) -> URL:
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


def _refuse_unsafe(engine: Engine | AsyncEngine) -> None:
    asynchronous = isinstance(engine, AsyncEngine)
    sync = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    url = engine.url.set(drivername=f"{engine.dialect.name}+{engine.dialect.driver}")
    if drivers.url_for(url, asynchronous=asynchronous).drivername != url.drivername:
        right = "create_async_engine" if not asynchronous else "create_engine"
        raise SetupError(f"the driver of {url.drivername} needs an engine by {right}")
    level = sync.get_execution_options().get("isolation_level") or getattr(
        sync.dialect, "_on_connect_isolation_level", None
    )
    if str(level).upper() == "AUTOCOMMIT":
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


def _watch_forks(engine: Engine) -> None:
    """A connection that a forked child inherited is left alone there: two processes would mix its answers."""

    @event.listens_for(engine, "connect")
    def _connect(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["idemq_process"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def _checkout(_connection: object, record: ConnectionPoolEntry, fairy: PoolProxiedConnection) -> None:
        if record.info.setdefault("idemq_process", os.getpid()) != os.getpid():
            record.dbapi_connection = fairy.dbapi_connection = None  # type: ignore[misc]  # as its docs say
            raise DisconnectionError("the connection belongs to the process that was forked")


def _prepare(engine: Engine) -> None:
    """Settings of our own engines: SQLite with write-ahead log and full durability."""
    _watch_forks(engine)
    if engine.dialect.name != "sqlite":
        return

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout = 30000")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()
