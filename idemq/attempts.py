"""Two thin shells around `process.Unit`: they hold a connection, call the handler and lose no error."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session

from idemq.bridge import uninterrupted
from idemq.declared import Consumer
from idemq.drivers import throw_away
from idemq.errors import DeadlinePassed, Reject
from idemq.failures import Job, Outcome
from idemq.message import Release, Verdict
from idemq.parking import Found
from idemq.payload import decode
from idemq.process import Unit, released

#: A connection that two processes share would mix their answers; the child must make its own engine and unit.
FORKED = (
    "this process was forked from the one that connected to the database: start it anew (spawn, not fork)"
)


class SyncUnit:
    """Runs the attempts of a sync handler, one at a time, on a connection that it holds and renews."""

    def __init__(self, engine: Engine, consumer: Consumer, number: int, *, trigger: bool = False) -> None:
        self._engine, self._consumer = engine, consumer
        self._number, self._trigger = number, trigger
        self._unit: Unit | None = None
        self._process = os.getpid()

    def run(self, job: Job) -> Verdict:
        """One attempt. Never raises an Exception."""
        try:
            if self._process != os.getpid():
                return Release(FORKED)
            verdict = self._attempt(self._opened(), job)
            if isinstance(verdict, Outcome):
                job.outcome = verdict
                verdict = self._opened().put(job)
            return verdict
        except BaseException as error:
            self._discard()
            if not isinstance(error, Exception):
                raise
            return released(error)
        finally:
            if self._unit is not None and self._unit.spoiled:
                self._discard()

    def look(self, owner: bytes, count: int, **how: Any) -> Found | Release:
        """Pick parked messages that are due: `process.Unit.look`. Never raises an Exception."""
        try:
            unit = self._opened()
            return unit.waiting().look(unit.connection, owner, count, **how)
        except Exception as error:
            self._discard()
            return released(error)

    def lease(self, owner: bytes, *, alone: bool | None = None) -> None:
        """`Parking.lease`. Raises database errors."""
        unit = self._opened()
        unit.waiting().lease(unit.connection, owner, alone=alone)

    def _opened(self) -> Unit:
        """A unit that can be used."""
        if self._unit is not None and self._unit.spoiled:
            self._discard()
        if self._unit is None:
            self._unit = self._open()
        return self._unit

    def _open(self) -> Unit:
        connection = self._engine.connect()
        try:
            return Unit(self._consumer, self._number, connection, trigger=self._trigger)
        except BaseException:
            throw_away(connection)
            raise

    def _attempt(self, unit: Unit, job: Job) -> Verdict | Outcome:
        verdict = unit.begin(job)
        if verdict is not None:
            return verdict
        handler = self._consumer.handler
        session: Session | None = None
        try:
            payload = decode(job.message, handler.decoder) if handler.decoder is not None else None
            session = self._consumer.sessions.on(unit.connection) if handler.wants_session else None
            result = handler.function(
                **handler.arguments(self._consumer.schema, job.message, payload, session, unit.connection)
            )
            _refuse_unfinished(result)
        except BaseException as error:  # SystemExit in a handler must not end the worker's thread
            return unit.fail(job, session, error)
        return unit.finish(job, session, result)

    def _discard(self) -> None:
        if self._unit is not None:
            self._unit.discard()
            self._unit = None

    def close(self) -> None:
        if self._unit is not None and self._process == os.getpid():
            self._unit.close()
            self._unit = None


def _refuse_unfinished(result: object) -> None:
    """What was returned instead of done, awaited or raised must not be acknowledged."""
    if result is None:
        return
    if inspect.iscoroutine(result):
        result.close()
    if inspect.isawaitable(result):
        raise TypeError("the handler returned an awaitable that nobody awaits: write await, and async def")
    if isinstance(result, Future):
        raise TypeError("the handler returned a Future: wait for its result() in the handler")
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(
            "the handler returned a generator, of which nothing has run: a handler must not yield"
        )
    if isinstance(result, BaseException) or result is Reject:
        raise TypeError(f"the handler returned {result!r}: raise it")


class AsyncUnit:
    """`SyncUnit` for async handlers: the same decisions, reached through `run_sync`."""

    def __init__(
        self,
        engine: AsyncEngine,
        consumer: Consumer,
        number: int,
        *,
        trigger: bool = False,
        apart: bool = False,
    ) -> None:
        """`apart`: a handler runs in a task of its own, so that what it does to its task, at once or by a
        timer that it forgot, reaches neither ours nor the next message. Nobody but the end of the process
        cancels our task then. Otherwise the handler runs in our task, which is the caller's to cancel."""
        self._engine, self._consumer = engine, consumer
        self._number, self._trigger, self._apart = number, trigger, apart
        self._connection: AsyncConnection | None = None
        self._unit: Unit | None = None
        self._process = os.getpid()

    async def run(self, job: Job) -> Verdict:
        """One attempt. Raises only the cancellation of the task that runs it."""
        try:
            if self._process != os.getpid():
                return Release(FORKED)
            verdict = await self._attempt(*await self._connected(), job)
            return await self._put(job, verdict) if isinstance(verdict, Outcome) else verdict
        except BaseException as error:
            await self._discard()
            if not isinstance(error, Exception):
                raise
            if _cancelling():  # asyncmy makes an error of its own out of a cancellation
                raise asyncio.CancelledError from error
            return released(error)
        finally:
            if self._unit is not None and self._unit.spoiled:
                await self._discard()

    async def _put(self, job: Job, outcome: Outcome) -> Verdict:
        job.outcome = outcome
        connection, unit = await self._connected()
        return await uninterrupted(connection.run_sync(lambda _: unit.put(job)))

    async def look(self, owner: bytes, count: int, **how: Any) -> Found | Release:
        """Pick parked messages that are due: `process.Unit.look`. Never raises an Exception."""
        try:
            connection, unit = await self._connected()
            return await connection.run_sync(lambda sync: unit.waiting().look(sync, owner, count, **how))
        except Exception as error:
            await self._discard()
            return released(error)

    async def lease(self, owner: bytes, *, alone: bool | None = None) -> None:
        """`Parking.lease`. Raises database errors."""
        connection, unit = await self._connected()
        await connection.run_sync(lambda sync: unit.waiting().lease(sync, owner, alone=alone))

    async def _connected(self) -> tuple[AsyncConnection, Unit]:
        """A unit that can be used, and its connection."""
        if self._unit is not None and self._unit.spoiled:
            await self._discard()
        if self._connection is None or self._unit is None:
            self._connection = connection = await self._engine.connect()
            self._unit = await connection.run_sync(
                lambda sync: Unit(self._consumer, self._number, sync, trigger=self._trigger)
            )
        return self._connection, self._unit

    async def _attempt(self, connection: AsyncConnection, unit: Unit, job: Job) -> Verdict | Outcome:
        verdict = await connection.run_sync(lambda _: unit.begin(job))
        if verdict is not None:
            return verdict
        handler = self._consumer.handler
        session = None
        try:
            payload = decode(job.message, handler.decoder) if handler.decoder is not None else None
            session = self._consumer.sessions.on_async(connection) if handler.wants_session else None
            arguments = handler.arguments(self._consumer.schema, job.message, payload, session, connection)
            call = partial(_call, handler.function, arguments, self._consumer.deadline)
            result = await (_apart(call) if self._apart else call())
            _refuse_unfinished(result)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _cancelling():
                raise  # our own task is to end; a CancelledError from the handler's inside is its failure
            if isinstance(error, _TaskCancelled):
                await self._discard()
                return unit.failed(job, asyncio.CancelledError("the handler's task was cancelled"))
            failure, sync = error, session.sync_session if session else None
            return await uninterrupted(connection.run_sync(lambda _: unit.fail(job, sync, failure)))
        sync = session.sync_session if session else None
        end = connection.run_sync(lambda _: unit.finish(job, sync, result))
        return await (end if self._apart else uninterrupted(end))

    async def _discard(self) -> None:
        unit, self._unit = self._unit, None
        connection, self._connection = self._connection, None
        if connection is not None:
            await uninterrupted(
                connection.run_sync(lambda sync: unit.discard() if unit is not None else throw_away(sync))
            )

    async def close(self) -> None:
        unit, self._unit = self._unit, None
        connection, self._connection = self._connection, None
        if connection is not None and unit is not None and self._process == os.getpid():
            await connection.run_sync(lambda _: unit.close())


class _TaskCancelled(asyncio.CancelledError):
    """The handler's own task was cancelled: nobody knows what its driver made of that."""


async def _apart(call: Callable[[], Awaitable[object]]) -> object:
    """The result of `call`, or what it raised, from a task of its own. Cancelling ours cancels that one."""
    try:
        result, error = await asyncio.ensure_future(_ended(call))
    except asyncio.CancelledError:  # before it began, or after it ended
        raise _TaskCancelled from None
    if error is not None:
        raise error
    return result


async def _ended(call: Callable[[], Awaitable[object]]) -> tuple[object, BaseException | None]:
    try:
        return await call(), None
    except BaseException as error:  # SystemExit would end the event loop
        if _cancelling():  # asyncmy makes an error of its own out of a cancellation
            return None, _TaskCancelled()
        return None, error


async def _call(function: Callable[..., Any], arguments: dict[str, Any], deadline: float | None) -> object:
    call = function(**arguments)
    return await (call if deadline is None else _within(call, deadline))


async def _within(call: Awaitable[object], deadline: float) -> object:
    """Cancels what runs longer, and tells it from a time-out of the handler's own.

    Whatever a handler makes of its cancellation: drivers make errors of it, and some swallow it.
    """
    result, error = None, None
    try:
        async with asyncio.timeout(deadline) as limit:
            result = await call
    except Exception as raised:
        error = raised
    if limit.expired():
        raise DeadlinePassed(f"the handler ran longer than its {deadline} s") from error
    if error is not None:
        raise error
    return result


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
