"""The one path of a message: begin, claim, handler, guard, commit; and what is true afterwards, as a verdict.

`Ack` and `Dead` are built only after the COMMIT that they speak of returned without an error. Everything
unexpected is a `Release`: the message is tried again, and its claim then tells what had happened.

`Unit` holds the decisions, over a sync `Connection`; the shells in `attempts` call the handler between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from idemq.drivers import error_code, is_transient, kind_of, undo_before_close
from idemq.errors import BadMessage, BrokeTransaction, InFlight, Reject, SetupError
from idemq.failures import BROKE, CONFLICT, REJECTED, Job, bury
from idemq.guard import Guard
from idemq.handlers import Handler
from idemq.ledger import WAIT, Ledger
from idemq.message import Ack, IdRule, Message, Release, Verdict, fingerprint_of, key_of, message_id
from idemq.sessions import Sessions


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """What the path needs to know of a declared consumer."""

    name: str
    handler: Handler
    id: IdRule | None = None
    #: The number that is compared for the same id (four bytes, signed); None compares nothing.
    fingerprint: Callable[[Message], int | None] = lambda message: fingerprint_of(message.body)
    #: Seconds that a repeat waits for its twin in flight.
    wait: float = WAIT
    strict: bool = False
    schema: str | None = None
    sessions: Sessions

    def job(self, message: Message) -> Job:
        """Never raises: what cannot be judged becomes a job that is buried."""
        try:
            identifier = message_id(message, self.id)
            if message.id != identifier:
                message = replace(message, id=identifier)
            job = Job(message, key_of(identifier), self.fingerprint(message))
            job.bad = BadMessage(message.unreadable) if message.unreadable else None
        except Exception as error:  # also from the user's id= and fingerprint= functions
            bad = error if isinstance(error, BadMessage) else BadMessage(f"{type(error).__name__}: {error}")
            job = Job(message, None, None, bad=BadMessage(message.unreadable) if message.unreadable else bad)
        return job


def fingerprint_by(
    name: str, function: Callable[[Message], bytes | str] | bool | None
) -> Callable[[Message], int | None]:
    """What a consumer's `fingerprint=` means."""
    if function is None or function is False:
        return lambda message: None
    if not callable(function):
        raise SetupError(f"consumer {name!r}: fingerprint= takes a function of the message, or None")

    def digest(message: Message) -> int:
        value = function(message)
        return fingerprint_of(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)

    return digest


def begin(connection: Connection) -> RootTransaction:
    """Start a transaction; on SQLite one that has the write lock from the start (never a failing upgrade)."""
    transaction = connection.begin()
    if kind_of(connection.dialect) == "sqlite":
        raw: Any = connection.connection.driver_connection
        if raw.in_transaction:  # the engine's own events began one, most often without the write lock
            connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    return transaction


class Unit:
    """One connection held for a consumer, and one attempt after another on it. Not thread-safe."""

    def __init__(self, consumer: Consumer, number: int, connection: Connection, *, trigger: bool) -> None:
        self.connection = connection
        self._consumer, self._number = consumer, number
        self._ledger = Ledger(connection.dialect, consumer.schema, consumer.wait)
        self._ledger.check(connection)
        undo_before_close(connection.engine)
        self._guard = Guard(connection, strict=consumer.strict, trigger=trigger)
        self._trigger = trigger
        self._transaction: RootTransaction | None = None
        self._token: str | bytes = b""
        #: Something went wrong that may have left the connection in a state of its own.
        self.spoiled = False

    def begin(self, job: Job) -> Verdict | None:
        """Claim the message; None: it is fresh, and the handler is to be called now.

        Raises database errors; nothing is settled then, and the unit is spoiled.
        """
        self._guard.hold()
        if job.bad is not None:
            return self.bury(job, getattr(job.bad, "reason", "unreadable"), job.bad)
        assert job.key is not None
        self._transaction = begin(self.connection)
        claim = self._ledger.claim(
            self.connection, self._number, job.key, job.fingerprint, job.message.sent_at
        )
        if claim.state == "fresh":
            job.tokens.add(claim.token)
            self._token = claim.token
            self._guard.lend(self._transaction, claim)
            return None
        self._transaction.rollback()
        if claim.state == "conflict":
            return self.bury(job, CONFLICT, None)
        if claim.token in job.tokens:
            return self.bury(job, BROKE, BrokeTransaction("an earlier attempt committed its claim too early"))
        return Ack(duplicate=True)

    def finish(self, job: Job, session: Session | None) -> Verdict:
        """The handler has returned: flush, guard, commit."""
        try:
            if session is not None:
                session.flush()
            self._guard.verify()
        except BaseException as error:  # a hook of the user's session may raise anything, as the handler may
            return self.fail(job, session, error)
        job.tokens.discard(self._token)  # whatever comes back: a claim found from here on is committed work
        verdict = self._commit(session, Ack())
        if isinstance(verdict, Release) and verdict.failed:  # a constraint that is checked by COMMIT
            job.failures += 1
        return verdict

    def _commit(self, session: Session | None, verdict: Verdict) -> Verdict:
        assert self._transaction is not None
        try:
            self._transaction.commit()
        except DBAPIError as error:
            self.spoiled = True
            return Release(_words(error), failed=not (error.connection_invalidated or is_transient(error)))
        if session is not None:
            session.close()
        return verdict

    def fail(self, job: Job, session: Session | None, error: BaseException) -> Verdict:
        """The handler raised, or broke its transaction: nothing of its work may stay."""
        self._guard.take_back()
        self._undo(session, broken=isinstance(error, BrokeTransaction))
        if isinstance(error, DBAPIError | PoolTimeout) and is_transient(error):
            return Release(_words(error))
        if not self.spoiled and isinstance(error, Reject):
            return self.bury(job, REJECTED, error)
        if not self.spoiled and isinstance(error, BadMessage):
            return self.bury(job, error.reason, error)
        job.failures += 1
        return Release(_words(error), failed=True)

    def _undo(self, session: Session | None, *, broken: bool) -> None:
        try:
            if session is not None:
                session.close()
            if self._transaction is not None:
                self._transaction.rollback()
        except Exception:
            self.spoiled = True
        self.spoiled = self.spoiled or broken or self.connection.closed or self.connection.invalidated

    def judge(self, job: Job) -> Verdict | None:
        """After a failed attempt: None, unless its claim is there all the same; then the message is dead now.

        Later, or elsewhere, nobody knows whose claim that is, and it passes for a repeat.
        """
        assert job.key is not None
        self._guard.hold()  # an async handler's failure was seen to in a task of its own
        self._transaction = begin(self.connection)
        claim = self._ledger.claim(
            self.connection, self._number, job.key, job.fingerprint, job.message.sent_at
        )
        self._transaction.rollback()
        if claim.state == "fresh" or claim.token not in job.tokens:
            return None  # the next attempt sees to it
        return self.bury(job, BROKE, BrokeTransaction("the attempt committed its claim too early"))

    def bury(self, job: Job, reason: str, error: BaseException | None) -> Verdict:
        """Make it a dead letter in a transaction of its own. Raises database errors; the unit is spoiled."""
        self._transaction = begin(self.connection)
        verdict = bury(self.connection, self._ledger, self._number, job, reason, error)
        if verdict == Ack(duplicate=True):
            self._transaction.rollback()
            return verdict
        if self._trigger:
            allow_commit(self.connection)
        return self._commit(None, verdict)

    def discard(self) -> None:
        """Throw the connection away; the server rolls back what it had open. Never raises."""
        try:
            self._guard.end()
        except Exception:
            pass
        throw_away(self.connection)

    def close(self) -> None:
        """Give the connection back to its pool."""
        self._guard.end()
        self.connection.close()


def throw_away(connection: Connection) -> None:
    """Close it for good instead of giving it back to its pool. Never raises."""
    for step in (connection.invalidate, connection.close):
        try:
            step()
        except Exception:
            pass  # it was gone already


def allow_commit(connection: Connection) -> None:
    """Tell the strict trigger that idemq asks for the COMMIT that follows."""
    connection.exec_driver_sql("SELECT set_config('idemq.done', pg_current_xact_id()::text, true)")


def released(error: BaseException) -> Release:
    """The verdict of an attempt that ended in an error outside the handler: never counted as a failure."""
    return Release("its twin is still in flight" if isinstance(error, InFlight) else _words(error))


def _words(error: BaseException) -> str:
    """What a log line may say: no statement, no parameters, no row, no value out of a database's error."""
    if not isinstance(error, StatementError):
        return f"{type(error).__name__}: {_text(error)}"
    cause = error.orig if error.orig is not None else error
    text = (_text(cause).splitlines() or [""])[0]
    if not isinstance(error, DBAPIError) or str(error_code(error)).startswith("22"):
        text = "a value does not fit" if not isinstance(error, DBAPIError) else _VALUE.sub("...", text)
    elif isinstance(error, DataError | IntegrityError):  # PostgreSQL puts the names of constraints in "..."
        text = re.sub("'[^']*'", "...", text)
    return f"{type(cause).__name__}: {text}"


_VALUE = re.compile("'.*'|\".*\"")


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # the user's own class may fail at it
        return "(it cannot be printed)"
