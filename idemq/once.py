"""The guarantee without the App, anywhere a message id is at hand.

    with once(engine, "receipts", message_id, body=body) as work:
        if work.fresh:
            work.session.add(Receipt(...))
    message.ack()

What comes after the block is reached only when claim and work are committed (given an engine), or are
together in the caller's own transaction, which the caller then commits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, overload

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from idemq import names
from idemq.block import Block, Body, Id, Request, claim_in, has_trigger, registered, request_of
from idemq.bridge import uninterrupted
from idemq.drivers import allow_commit
from idemq.errors import BrokeTransaction, SetupError
from idemq.ledger import WAIT
from idemq.scopes import ConnectionScope, Scope, SessionScope, refuse_shared
from idemq.work import AsyncEngineWork, AsyncWithBlock, EngineWork, WithBlock, Work

_Borrowed = Session | scoped_session[Any] | Connection
_AsyncBorrowed = AsyncSession | async_scoped_session[Any] | AsyncConnection


@overload
def once(
    target: Engine,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
    strict: bool = False,
) -> AbstractContextManager[EngineWork]: ...
@overload
def once(
    target: AsyncEngine,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
    strict: bool = False,
) -> AbstractAsyncContextManager[AsyncEngineWork]: ...
@overload
def once(
    target: _Borrowed,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
    strict: bool = False,
) -> AbstractContextManager[Work]: ...
@overload
def once(
    target: _AsyncBorrowed,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
    strict: bool = False,
) -> AbstractAsyncContextManager[Work]: ...
def once(
    target: Engine | AsyncEngine | _Borrowed | _AsyncBorrowed,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
    strict: bool = False,
) -> AbstractContextManager[Work] | AbstractAsyncContextManager[Work]:
    """A block whose work is done once for each (consumer, message id): `work.fresh` says whether now.

    Given an Engine it owns a transaction: `work.session` or `work.connection` is where the work goes, and
    leaving the block commits. Given a Session or Connection it works in the caller's transaction, in a
    savepoint where one is open already; it is checked there and never committed: that is the caller's, after
    the block. An exception undoes claim and work together, and so does every attempt to end the transaction
    inside the block (`BrokeTransaction`).

    `consumer` scopes the ids. `body` tells a repeat from another message with the same id, which raises
    `Conflict`; None compares nothing. A twin in flight is waited for, `wait` seconds at most, then `InFlight`
    is raised (SQLite: for the connection's busy timeout, because any other writer may be the twin). `schema`
    is the database schema of idemq's tables; where they are missing, `SchemaError` is raised. `strict` sees
    also a rollback through the driver that is followed by more work, for one more round trip.

    Any exception means: do not acknowledge. When the reply to COMMIT was lost, nobody knows what happened;
    the next delivery's block finds out.
    """
    request = request_of(consumer, message_id, body, wait, schema, strict)
    if isinstance(target, scoped_session | async_scoped_session):
        target = target()
    match target:
        case Engine():
            return WithBlock(_on_engine(target, request))
        case AsyncEngine():
            return AsyncWithBlock(_on_async_engine(target, request))
        case Session() | Connection():
            return WithBlock(_inside(target, request))
        case AsyncSession() | AsyncConnection():
            return AsyncWithBlock(_inside_async(target, request))
    raise SetupError(
        f"once(): {type(target).__name__} is no Engine, Session or Connection of SQLAlchemy, sync or async"
    )


def claim(
    connection: Connection,
    consumer: str,
    message_id: Id,
    *,
    body: Body = None,
    wait: float = WAIT,
    schema: str | None = None,
) -> bool:
    """Record the id in the connection's transaction: True when it is new, False when it was there already.

    Raises `Conflict`, `InFlight` and `SchemaError` like `once`, and leaves the transaction as it was then.
    For an AsyncConnection: `await connection.run_sync(claim, ...)`.

    It cannot see what comes after it. Prefer `once`, unless the work cannot be put into a block: a commit too
    early, a rollback, a database error that was swallowed (PostgreSQL then answers COMMIT with a rollback and
    raises nothing), DDL on MySQL, another connection; after all of them idemq says True once and the work may
    be lost. Where the strict trigger is installed, the permission to commit is given at once.
    """
    request = request_of(consumer, message_id, body, wait, schema, False)
    if not isinstance(connection, Connection):
        raise SetupError(
            f"claim() takes a sync Connection, not {type(connection).__name__}; of a Session give "
            "session.connection(), and call it through run_sync on async ones"
        )
    scope = ConnectionScope(connection)
    scope.release()
    try:
        with names.naming_missing_tables():
            number = names.number_of(connection, consumer, schema)
            fresh = claim_in(connection, request, number).state == "fresh"
        if fresh and has_trigger(connection, schema):
            allow_commit(connection)
    except BaseException:
        scope.undo()
        raise
    if fresh:
        scope.keep()
    else:
        scope.undo()
    return fresh


@contextmanager
def _inside(target: Session | Connection, request: Request) -> Iterator[Work]:
    block = Block(_scope(target), request)
    work = Work(block)
    try:
        yield work
    except BaseException as error:
        _leave(block, work, error)
        raise
    _leave(block, work, None)


@asynccontextmanager
async def _inside_async(target: AsyncSession | AsyncConnection, request: Request) -> AsyncIterator[Work]:
    block = await target.run_sync(lambda sync: Block(_scope(sync), request))
    work = Work(block)
    try:
        yield work
    except BaseException as error:
        failure = error
        await uninterrupted(target.run_sync(lambda _: _leave(block, work, failure)))
        raise
    await uninterrupted(target.run_sync(lambda _: _leave(block, work, None)))


def _scope(target: Session | Connection) -> Scope:
    return SessionScope(target) if isinstance(target, Session) else ConnectionScope(target)


def _leave(block: Block, work: Work, error: BaseException | None) -> None:
    result = work.close()
    if block.fresh:
        if error is None:
            block.finish(result)
        else:
            block.fail(error)


@contextmanager
def _on_engine(engine: Engine, request: Request) -> Iterator[EngineWork]:
    refuse_shared(engine)
    begun: Block | None = None
    try:
        with engine.connect() as connection:
            begun, scope = block, _ = _open(connection, request)
            work = EngineWork(block, scope)
            if not work.fresh:
                connection.close()  # nobody waits for a connection while the answer is made
            try:
                yield work
            except BaseException as error:
                _leave(block, work, error)
                raise
            _commit(block, work, scope)
    except BrokeTransaction as error:
        if begun is None:
            raise
        with engine.connect() as connection:
            raise _told(connection, begun, error) from error


@asynccontextmanager
async def _on_async_engine(engine: AsyncEngine, request: Request) -> AsyncIterator[AsyncEngineWork]:
    refuse_shared(engine.sync_engine)
    begun: Block | None = None
    try:
        async with engine.connect() as connection:
            begun, scope = block, _ = await connection.run_sync(_open, request)
            work = AsyncEngineWork(block, scope, connection)
            if not work.fresh:
                await connection.close()
            try:
                yield work
            except BaseException as error:
                failure = error
                if work.fresh:
                    await uninterrupted(connection.run_sync(lambda _: _leave(block, work, failure)))
                raise
            if work.fresh:
                await uninterrupted(connection.run_sync(lambda _: _commit(block, work, scope)))
    except BrokeTransaction as error:
        if begun is None:
            raise
        async with engine.connect() as connection:
            raise await connection.run_sync(_told, begun, error) from error


def _open(connection: Connection, request: Request) -> tuple[Block, ConnectionScope]:
    number = registered(connection, request.consumer, request.schema)
    scope = ConnectionScope(connection)
    return Block(scope, request, number), scope


def _commit(block: Block, work: Work, scope: ConnectionScope) -> None:
    _leave(block, work, None)
    if not work.fresh:
        return
    try:
        scope.root.commit()
    except BaseException:
        scope.undo_all()  # a doubt: the connection is not used again, whatever it is about
        raise
    if scope.session is not None:
        scope.session.close()


def _told(connection: Connection, block: Block, error: BrokeTransaction) -> BrokeTransaction:
    """The error, with what became of the claim: after an early COMMIT a repeat would be skipped."""
    try:
        if block.fresh and block.is_committed(connection):
            return BrokeTransaction(
                f"{error}; its claim was committed with a part of the work, so that repeats will be skipped: "
                "see what is missing"
            )
    except Exception:
        pass  # the database cannot be asked now; the error itself says enough
    return BrokeTransaction(str(error))
