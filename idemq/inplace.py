"""One message at a time, tried where it is until it may be settled: for loops that idemq does not run.

`run` returns only what allows an acknowledgement. What a worker would keep and try later is tried here, with
growing pauses; when the time for that is used up, `NotSettled` is raised, so that the caller's ack or commit
is not reached. Nothing is parked, because there may be nobody to take it up; dead letters are written.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Never, TypedDict

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_result,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
)

from idemq import schema
from idemq.attempts import AsyncUnit, SyncUnit
from idemq.block import has_trigger, registered
from idemq.declared import Consumer, fingerprint_by
from idemq.errors import NotSettled, SchemaError, SetupError
from idemq.failures import Job
from idemq.handlers import Handler, read
from idemq.ledger import WAIT
from idemq.message import Ack, Dead, IdRule, Message, Release, Verdict
from idemq.options import check
from idemq.process import released
from idemq.retry import PAUSE
from idemq.scopes import refuse_shared
from idemq.sessions import Maker, Sessions

log = logging.getLogger("idemq.inplace")


class Options(TypedDict, total=False):
    """What may be said of a consumer outside an App; the same as there."""

    id: str | IdRule | None
    fingerprint: Callable[[Message], bytes | str] | bool | None
    wait: float
    strict: bool
    schema: str | None
    session: Maker | None


class InPlace:
    """A handler over one engine. Holds a connection for each call that ran at the same time, until closed.

    Sync handlers want an Engine and `run`; async ones an AsyncEngine and `run_async`.
    """

    def __init__(
        self,
        handler: Callable[..., Any],
        engine: Engine | AsyncEngine,
        consumer: str,
        *,
        give_up: float = 60.0,
        **options: Any,
    ) -> None:
        known = Options.__annotations__
        check(consumer, options.keys() - known.keys(), {name: options.get(name) for name in known})
        read_handler = read(handler, consumer)
        self.asynchronous = read_handler.asynchronous
        if isinstance(engine, AsyncEngine) != self.asynchronous:
            kind, wanted = ("async", "AsyncEngine") if self.asynchronous else ("sync", "Engine")
            raise SetupError(f"consumer {consumer!r}: its handler is {kind}: give it an {wanted}")
        refuse_shared(engine.sync_engine if isinstance(engine, AsyncEngine) else engine)
        number = isinstance(give_up, int | float) and not isinstance(give_up, bool)
        if not number or not 0 <= give_up <= 86_400:
            raise SetupError(f"consumer {consumer!r}: give_up={give_up!r} must be from 0 to 86,400 seconds")
        self._engine = engine
        self._give_up = give_up
        self._raised = threading.local()
        self._consumer = _consumer(consumer, self._noting(read_handler), options)
        self._holding = True
        self._idle: deque[SyncUnit] = deque()
        self._idle_async: deque[AsyncUnit] = deque()

    def run(self, message: Message, stop: threading.Event | None = None) -> Ack | Dead:
        """Raises `NotSettled`, at once between two attempts when `stop` is set, `SchemaError` where
        tables are missing, and what ends the process."""
        stop = stop or threading.Event()
        trying = Retrying(
            sleep=sleep_using_event(stop),
            stop=stop_after_delay(self._give_up) | stop_when_event_set(stop),
            **self._policy(),
        )
        return _settled(trying(self._attempt, self._consumer.job(message)))

    async def run_async(self, message: Message) -> Ack | Dead:
        """`run` for an async handler."""
        trying = AsyncRetrying(stop=stop_after_delay(self._give_up), **self._policy())
        return _settled(await trying(self._attempt_async, self._consumer.job(message)))

    async def run_in_thread(self, message: Message) -> Ack | Dead:
        """`run` for a sync handler on an event loop, which goes on meanwhile.

        When our task is cancelled, the present attempt is waited for and no other one begun.
        """
        stop = threading.Event()
        running = asyncio.ensure_future(asyncio.to_thread(self.run, message, stop))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({running})
            running.exception()  # it is looked at: nobody else will
            raise

    def close(self) -> None:
        """Give the held connections back to the engine's pool, and hold none from now on."""
        self._holding = False
        while self._idle:
            self._idle.pop().close()

    async def close_async(self) -> None:
        """`close` for an async handler."""
        self._holding = False
        while self._idle_async:
            await self._idle_async.pop().close()

    def _attempt(self, job: Job) -> Verdict:
        assert isinstance(self._engine, Engine)
        try:
            unit = self._idle.pop()
        except IndexError:
            try:
                with self._engine.connect() as connection:
                    number, trigger = self._place(connection)
            except (SetupError, SchemaError):
                raise
            except Exception as error:
                return released(error)
            unit = SyncUnit(self._engine, self._consumer, number, trigger=trigger)
        self._raised.error = None
        verdict = unit.run(job)
        self._idle.append(unit)
        if not self._holding:
            self.close()
        if self._raised.error is not None:
            raise self._raised.error
        return verdict

    async def _attempt_async(self, job: Job) -> Verdict:
        assert isinstance(self._engine, AsyncEngine)
        try:
            unit = self._idle_async.pop()
        except IndexError:
            try:
                async with self._engine.connect() as connection:
                    number, trigger = await connection.run_sync(self._place)
            except (SetupError, SchemaError):
                raise
            except Exception as error:
                return released(error)
            unit = AsyncUnit(self._engine, self._consumer, number, trigger=trigger)
        verdict = await unit.run(job)
        self._idle_async.append(unit)
        if not self._holding:
            await self.close_async()
        return verdict

    def _place(self, connection: Connection) -> tuple[int, bool]:
        number = registered(connection, self._consumer.name, self._consumer.schema)
        return number, has_trigger(connection, self._consumer.schema)

    def _noting(self, handler: Handler) -> Handler:
        """A unit takes everything that a handler raises for its failure; here Ctrl-C is the caller's."""
        if handler.asynchronous:
            return handler
        function = handler.function

        @functools.wraps(function)
        def noting(**arguments: Any) -> Any:
            try:
                return function(**arguments)
            except (KeyboardInterrupt, SystemExit) as error:
                self._raised.error = error
                raise

        return replace(handler, function=noting)

    def _policy(self) -> dict[str, Any]:
        def pause(state: RetryCallState) -> float:
            return min(PAUSE(state), max(0.0, self._give_up - (state.seconds_since_start or 0.0)))

        return {
            "retry": retry_if_result(lambda verdict: isinstance(verdict, Release)),
            "wait": pause,
            "before_sleep": self._tell,
            "retry_error_callback": self._not_settled,
        }

    def _tell(self, state: RetryCallState) -> None:
        cause, pause = _cause(state), state.next_action.sleep if state.next_action else 0.0
        log.warning("%s: not done (%r); tried again in %.1f s", self._consumer.name, cause, pause)

    def _not_settled(self, state: RetryCallState) -> Never:
        raise NotSettled(
            f"consumer {self._consumer.name!r}: not processed after {state.attempt_number} attempts in "
            f"{state.seconds_since_start or 0.0:.0f} s; do not acknowledge. The last one: {_cause(state)}"
        )


def _consumer(name: str, handler: Handler, given: dict[str, Any]) -> Consumer:
    schema.tables(given.get("schema"))  # refuses a name that is no plain identifier
    sessions = Sessions(given.get("session"))
    for wanted in handler.session_classes:
        if not sessions.provides(wanted):
            raise SetupError(f"consumer {name!r}: session= does not make the {wanted.__name__} it asks for")
    options: dict[str, Any] = {}
    if given.get("fingerprint", True) is not True:
        options["fingerprint"] = fingerprint_by(name, given["fingerprint"])
    rule = given.get("id")
    return Consumer(
        name=name,
        handler=handler,
        id=(rule,) if isinstance(rule, str) else rule,
        wait=given.get("wait") or WAIT,
        strict=given.get("strict", False),
        schema=given.get("schema"),
        sessions=sessions,
        **options,
    )


def _cause(state: RetryCallState) -> str:
    verdict = state.outcome.result() if state.outcome is not None else None
    return verdict.cause if isinstance(verdict, Release) else ""


def _settled(verdict: Verdict) -> Ack | Dead:
    assert isinstance(verdict, Ack | Dead)  # nothing is parked here, and a Release was tried again
    if isinstance(verdict, Dead):
        log.warning("a dead letter: %s", verdict.reason)
    return verdict
