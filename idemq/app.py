"""`App`: the consumers of one application over one database, declared; mistakes raise here and now."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Never, TypeVar
from uuid import UUID

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from tenacity import BaseRetrying

from idemq import drivers
from idemq.broker import Broker, Source
from idemq.declared import Consumer, fingerprint_by, key_by
from idemq.effects import SETTLE, Effect, LookUp, declare
from idemq.engines import parsed, prepare, refuse_unsafe, watch_forks
from idemq.errors import SetupError
from idemq.failures import MAX_KEPT
from idemq.handlers import Handler, read
from idemq.ledger import WAIT
from idemq.message import Message
from idemq.options import check
from idemq.relay import Leaving
from idemq.retry import policy
from idemq.sessions import Maker, Sessions

Function = TypeVar("Function", bound=Callable[..., Any])

#: What `consumer` is given beside options.
_NO_OPTIONS = ("self", "name", "source", "unknown")

#: Options that the path of a message knows under the same name.
_PASSED = ("wait", "strict", "deadline", "max_crashes", "undated", "max_kept", "ordered", "hold_dead")

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
    connection's). `brokers` are those that the app publishes to through its outbox. Raises `SetupError` for
    whatever would break the guarantee.
    """

    def __init__(
        self,
        database: str | URL | Engine | AsyncEngine,
        async_engine: AsyncEngine | None = None,
        *,
        session: Maker | None = None,
        schema: str | None = None,
        brokers: Sequence[Broker] = (),
    ) -> None:
        if schema is not None and not _IDENTIFIER.match(schema):
            raise SetupError(f"schema={schema!r}: not a plain identifier (letters, digits, underscore)")
        self.schema = schema
        self.sessions = Sessions(session)
        self.consumers: dict[str, Declared] = {}
        self.effects: dict[str, Effect] = {}
        self.brokers = {broker.name: broker for broker in brokers}
        if len(self.brokers) < len(brokers):
            raise SetupError("App(brokers=...): two have the same name; give one of them another name=")
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
            self._url = parsed(database)
        for engine in (self._engine, self._async_engine):
            if engine is not None:
                refuse_unsafe(engine)
                watch_forks(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)

    @property
    def engine(self) -> Engine | None:
        """The sync engine, from a URL made when first asked for; None when there is no driver for it."""
        if self._engine is None and self._url is not None and self._installed(asynchronous=False):
            self._engine = create_engine(drivers.url_for(self._url, asynchronous=False), max_overflow=-1)
            refuse_unsafe(self._engine)
            prepare(self._engine)
        return self._engine

    @property
    def async_engine(self) -> AsyncEngine | None:
        """The async engine, from a URL made when first asked for; None when there is no driver for it."""
        if self._async_engine is None and self._url is not None and self._installed(asynchronous=True):
            url = drivers.url_for(self._url, asynchronous=True)
            self._async_engine = create_async_engine(url, max_overflow=-1)
            refuse_unsafe(self._async_engine)
            prepare(self._async_engine.sync_engine)
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
        ordered: bool = False,
        key: str | Callable[[Message], object] | None = None,
        hold_dead: bool = False,
        answer: bool = False,
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

        `ordered`: one message of a key at a time, in the order in which they came, over retries, rebalances
        and frozen workers; what follows a parked message is parked behind it. The key is Kafka's record key,
        or what `key` says: a header name or a function of the message; those without one are in order with
        each other. `hold_dead`: a dead letter holds what follows it of its key, until it is retried or
        dropped.

        `answer`: what the handler returns is sent, as JSON, to where the message asks for it (AMQP's
        `reply_to`, or a header `reply-to`), with its correlation id; a repeat is sent the first answer again.
        """
        given = {option: each for option, each in locals().items() if option not in _NO_OPTIONS}
        check(name, unknown, given)
        self._check_name(name)
        if name == "relay":
            raise SetupError("consumer 'relay': `idemq run --only relay` means the relay; take another name")
        if not hasattr(source, "subscribe"):
            raise SetupError(f"consumer {name!r}: {source!r} is no source such as broker.queue(...)")
        return partial(self._declare, name, source, given)

    def effect(
        self,
        name: str,
        *,
        repeat: Literal["provider-key"] | LookUp | None = None,
        key_lifetime: float | None = None,
        settle: float = SETTLE,
        retry: BaseRetrying | None = None,
        concurrency: int = 10,
    ) -> Callable[[Function], Function]:
        """Declare the decorated function as an effect; it is given back unchanged.

        It takes the payload and the provider key, a text that is the same for every attempt. Returning means
        that the effect is there; `NotSent` that this call has certainly not got through (tried again by
        `retry`, a `tenacity.Retrying`); `Refused` that the provider said no for good; every other exception,
        and the death of the process, leaves it *in doubt*. That is resolved by `repeat`:
        "provider-key": called again, while the provider knows the key, `key_lifetime` seconds from the first
        call, less a minute. A look-up, a function like the effect: True ends it, False has it called again,
        asked `settle` seconds after the last call ended. None: by a person, `idemq doubt list`.
        `concurrency`: calls at a time in each process.
        """
        if name in self.effects:
            raise SetupError(f"effect {name!r} is declared twice")

        def declared(function: Function) -> Function:
            self.effects[name] = declare(
                name,
                function,
                repeat=repeat,
                key_lifetime=key_lifetime,
                settle=settle,
                retry=retry,
                concurrency=concurrency,
            )
            return function

        return declared

    def leaving(self) -> Leaving | None:
        """What a relay of this app sends; None when it declares neither brokers nor effects."""
        if not self.brokers and not self.effects:
            return None
        engine = self.engine or self.async_engine
        assert engine is not None
        return Leaving(list(self.brokers.values()), list(self.effects.values()), engine, self.schema)

    def _declare(self, name: str, source: Source, given: dict[str, Any], function: Function) -> Function:
        self._check_name(name)
        options: dict[str, Any] = {option: given[option] for option in _PASSED}
        if given["fingerprint"] is not True:
            options["fingerprint"] = fingerprint_by(name, given["fingerprint"])
        if given["ordered"]:
            try:
                source.orders()
            except SetupError as error:
                raise SetupError(f"consumer {name!r}: ordered=True: {error}") from None
        rule, before, concurrency = given["id"], given["known_as"], given["concurrency"]
        consumer = Consumer(
            name=name,
            handler=self._handler(name, function),
            id=(rule,) if isinstance(rule, str) else rule,
            policy=policy(name, given["retry"]),
            key=key_by(name, given["key"]),
            schema=self.schema,
            sessions=self.sessions,
            parks=True,
            answers=source.broker if given["answer"] else None,
            **options,
        )
        if consumer.answers is not None:
            self.brokers.setdefault(source.broker.name, source.broker)
        ahead = given["prefetch"] or min(1000, source.prefetch_per_lane * concurrency)
        names = (before,) if isinstance(before, str) else tuple(before)
        self.consumers[name] = Declared(consumer, source, concurrency, ahead, names)
        return function

    def _check_name(self, name: str) -> None:
        if name in self.consumers:
            raise SetupError(f"consumer {name!r} is declared twice; names scope the ids and must differ")

    def _handler(self, name: str, function: Callable[..., Any]) -> Handler:
        handler = read(function, name)
        if "outbox" in handler.wants.values() and not self.brokers:
            raise SetupError(
                f"consumer {name!r}: its handler publishes, but nothing is known of where: App(brokers=[...])"
            )
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
