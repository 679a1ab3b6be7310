"""`App`: the consumers of one application over one database, declared; mistakes raise here and now."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Never, TypeVar
from uuid import UUID

from sqlalchemy import URL, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from idemq import drivers
from idemq.broker import Source
from idemq.errors import SetupError
from idemq.handlers import Handler, read
from idemq.ledger import WAIT
from idemq.message import IdRule, Message
from idemq.process import Consumer, fingerprint_by
from idemq.sessions import Maker, Sessions

Function = TypeVar("Function", bound=Callable[..., Any])

#: Why a SQLite database must be a file.
MEMORY = "a :memory: database or a StaticPool gives all threads one transaction; use a SQLite file"

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
        """
        self._check_options(name, id, concurrency, prefetch, wait, unknown)
        _check_kinds(name, source, id, fingerprint)
        options: dict[str, Any] = {}
        if fingerprint is not True:
            options["fingerprint"] = fingerprint_by(name, fingerprint)

        def declare(function: Function) -> Function:
            self._check_name(name)
            consumer = Consumer(
                name=name,
                handler=self._handler(name, function),
                id=(id,) if isinstance(id, str) else id,
                wait=wait,
                strict=strict,
                schema=self.schema,
                sessions=self.sessions,
                **options,
            )
            before = (known_as,) if isinstance(known_as, str) else tuple(known_as)
            ahead = prefetch or min(1000, source.prefetch_per_lane * concurrency)
            self.consumers[name] = Declared(consumer, source, concurrency, ahead, before)
            return function

        return declare

    def _check_options(
        self,
        name: str,
        rule: IdRule | str | None,
        concurrency: int,
        prefetch: int | None,
        wait: float,
        unknown: Collection[str],
    ) -> None:
        known = ("id", "fingerprint", "concurrency", "prefetch", "wait", "strict", "known_as")
        for option in unknown:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise SetupError(f"consumer {name!r}: unknown option {option!r}; {hint}")
        if rule is not None and not callable(rule) and (not rule or not all(rule)):
            raise SetupError(f"consumer {name!r}: id={rule!r} names no header")
        if not name or len(name.encode()) > 200:
            raise SetupError(f"consumer {name!r}: a name has 1 to 200 bytes")
        self._check_name(name)
        for option, number in (("concurrency", concurrency), ("prefetch", prefetch)):
            if number is not None and type(number) is not int:
                raise SetupError(f"consumer {name!r}: {option}={number!r} must be a whole number")
        if concurrency < 1:
            raise SetupError(f"consumer {name!r}: concurrency={concurrency} must be at least 1")
        if prefetch is not None and not 1 <= prefetch <= 1000:
            raise SetupError(f"consumer {name!r}: prefetch={prefetch} must be from 1 to 1000")
        if not 0.001 <= wait <= 3600:
            raise SetupError(f"consumer {name!r}: wait={wait} must be from 0.001 to 3600 seconds")

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


def _check_kinds(name: str, source: object, *functions: object) -> None:
    if not hasattr(source, "subscribe"):
        raise SetupError(f"consumer {name!r}: {source!r} is no source such as broker.queue(...)")
    if any(inspect.iscoroutinefunction(function) for function in functions):
        raise SetupError(f"consumer {name!r}: id= and fingerprint= take plain functions, not async ones")


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
