"""The one path of a message: begin, claim, handler, guard, commit; and what is true afterwards, as a verdict.

`Ack` and `Dead` are built only after the COMMIT that they speak of returned without an error. Everything
unexpected is a `Release`: the message is tried again, and its claim then tells what had happened.

`Unit` holds the decisions, over a sync `Connection`; the shells in `attempts` call the handler between them.
"""

from __future__ import annotations

import random
from time import monotonic

from sqlalchemy import Connection, delete
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from idemq import failures, schema
from idemq.declared import Consumer, too_late
from idemq.drivers import (
    allow_commit,
    begin,
    is_contention,
    is_outage,
    is_transient,
    throw_away,
    undo_before_close,
)
from idemq.errors import (
    BadMessage,
    BrokeTransaction,
    DeadlinePassed,
    InFlight,
    LockTimeout,
    Reject,
    RetryLater,
)
from idemq.failures import FAILED, LATER, SUSPECT, Job, Outcome, Row, TooLarge
from idemq.guard import Guard
from idemq.ledger import Claim, Ledger
from idemq.message import Ack, Release, Verdict
from idemq.packing import words
from idemq.parking import KEEP, MOST_BEHIND, Parking
from idemq.replies import Replies

#: For so many seconds a failed message waits in the worker, and for `KEEP` in all; for longer it is parked.
SHORT = 1.0

#: The shortest delay that a handler can ask for, in seconds: none at all would be a hot loop.
SOON = 0.1

#: Deadlocks and the like that a message may meet in a row before they count as failures.
CONTENDED = 20

#: Connections that a message may lose while its handler runs: the next one is its own doing, and counts.
LOST = 3


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
        #: The messages of this consumer that wait in the database.
        self.parking = Parking(
            self._ledger,
            number,
            consumer.job,
            consumer.max_crashes,
            ordered=consumer.ordered,
            hold_dead=consumer.hold_dead,
        )
        self._replies: Replies | None = None
        if consumer.answers is not None:
            self._replies = Replies(consumer.answers, number, consumer.schema)
        self._transaction: RootTransaction | None = None
        self._token: str | bytes = b""
        #: Something went wrong that may have left the connection in a state of its own.
        self.spoiled = False

    def begin(self, job: Job) -> Verdict | None:
        """Claim the message; None: it is fresh, and the handler is to be called now.

        Raises database errors; nothing is settled then, and the unit is spoiled.
        """
        self._guard.hold()
        job.outcome = job.outcome or job.burial()  # again, when it could not be parked beside its twin
        if job.outcome is not None and job.outcome.reason != SUSPECT:
            return self.put(job)
        assert job.key is not None
        self._transaction = begin(self.connection)
        claim = self._claim(job, job.key)
        owned = job.row is not None and job.row.owns_claim
        if claim.state == "fresh" and not owned and (reason := self._late(job)) is not None:
            job.outcome = Outcome(reason)
        if claim.state == "fresh" and job.outcome is None:
            behind = self.parking.behind(self.connection, job)
            if behind >= MOST_BEHIND and job.row is None:
                self._transaction.rollback()
                return Release(f"{behind} messages of its key are parked before it")
            job.outcome = Outcome(failures.BEHIND, None, 0.0) if behind else None
        if claim.state == "fresh" and job.outcome is None:
            job.deadline = monotonic() + self._consumer.deadline if self._consumer.deadline else None
            job.tokens.add(claim.token)
            self._token = claim.token
            self._guard.lend(self._transaction, claim)
            return None
        self._transaction.rollback()
        if job.outcome is not None:
            return self.put(job)
        if claim.state == "conflict":
            job.outcome = Outcome(failures.CONFLICT)
        elif claim.state == "duplicate" and (job.row is not None or claim.token in job.tokens):
            job.outcome = Outcome(failures.BROKE)  # unless the claim is another's, which ends the row as well
        return self.put(job) if job.outcome is not None else self._repeat(job)

    def _repeat(self, job: Job) -> Verdict:
        if self._replies is None or job.key is None:
            return Ack(duplicate=True)
        self._transaction = begin(self.connection)
        self._replies.again(self.connection, job.key, job.message)
        if self._trigger:
            allow_commit(self.connection)
        return self._commit(Ack(duplicate=True))

    def _claim(self, job: Job, key: bytes) -> Claim:
        """The claim of a delivery; or that of a parked message, whose row goes in the same transaction."""
        row = job.row
        if row is not None and row.owns_claim:
            if not self._delete(row):
                return Claim("lost", b"")
            claim = self._ledger.reclaim(self.connection, self._number, key)
            if claim is not None:
                return claim
        claim = self._ledger.claim(self.connection, self._number, key, job.fingerprint, job.message.sent_at)
        if row is not None and not row.owns_claim and claim.state == "fresh" and not self._delete(row):
            return Claim("lost", b"")
        return claim

    def _delete(self, row: Row) -> bool:
        table = schema.table("idemq_failed", self._ledger.schema)
        return self.connection.execute(delete(table).where(failures.mine(table, row))).rowcount > 0

    def _late(self, job: Job) -> str | None:
        return too_late(self._consumer, job.message, self._ledger, self.connection, self._number)

    def finish(self, job: Job, session: Session | None, result: object) -> Verdict | Outcome:
        """The handler has returned: flush, answer, guard, commit."""
        try:
            if session is not None:
                session.flush()
            if self._replies is not None and job.key is not None:
                self._replies.first(self.connection, job.key, job.message, result)
            if job.deadline is not None and monotonic() > job.deadline:
                raise DeadlinePassed(f"the handler ran longer than its {self._consumer.deadline} s")
            self._guard.verify()
        except BaseException as error:  # a hook of the user's session may raise anything, as the handler may
            return self.fail(job, session, error)
        job.tokens.discard(self._token)  # whatever comes back: a claim found from here on is committed work
        try:
            verdict = self._commit(Ack())
        except DBAPIError as error:  # a constraint that is checked by COMMIT
            return self.failed(job, error)
        if session is not None and verdict == Ack():
            session.close()
        return verdict

    def _commit(self, verdict: Verdict) -> Verdict:
        """COMMIT; `Release` when nobody knows its outcome. Raises the refusals of the database."""
        assert self._transaction is not None
        try:
            self._transaction.commit()
        except DBAPIError as error:
            self.spoiled = True
            if error.connection_invalidated or is_transient(error):
                return Release(words(error), outage=is_outage(error))
            raise
        return verdict

    def fail(self, job: Job, session: Session | None, error: BaseException) -> Verdict | Outcome:
        """The handler raised, or broke its transaction: nothing of its work may stay.

        An `Outcome` is to be given to `put`, by another unit when this one is spoiled.
        """
        self._guard.take_back()
        self._undo(session, broken=isinstance(error, BrokeTransaction))
        contention = isinstance(error, LockTimeout) or (
            isinstance(error, DBAPIError) and is_contention(error)
        )
        if contention and job.contended < CONTENDED:
            job.contended += 1
            delay = random.uniform(0.0, min(SHORT, 0.05 * 2**job.contended))
            return Outcome(failures.CONTENTION, error, delay, words(error))
        if self._guard.saw(error) and is_outage(error):  # another database is the handler's own affair
            job.lost += 1  # an outage is met by the claim, too, before the handler is called again
            if job.lost <= LOST:
                return Release(words(error), outage=True)
        return self.failed(job, error)

    def failed(self, job: Job, error: BaseException) -> Outcome:
        """What becomes of an attempt that failed."""
        if isinstance(error, Reject):
            return Outcome(failures.REJECTED, error)
        if isinstance(error, BadMessage):
            return Outcome(error.reason, error)
        if isinstance(error, RetryLater):
            return Outcome(LATER, error, max(SOON, error.seconds), words(error))
        job.failures += 1
        policy = self._consumer.policy
        delay = policy(job.failures, monotonic() - job.began, error) if policy is not None else 0.0
        if delay is None:
            return Outcome(failures.USED_UP, error, None, words(error))
        return Outcome(FAILED, error, max(SOON, delay), words(error))

    def _undo(self, session: Session | None, *, broken: bool) -> None:
        try:
            if session is not None:
                session.close()
            if self._transaction is not None:
                self._transaction.rollback()
        except Exception:
            self.spoiled = True
        self.spoiled = self.spoiled or broken or self.connection.closed or self.connection.invalidated

    def put(self, job: Job) -> Verdict:
        """Write `job.outcome` down, in a transaction of its own. Raises database errors; the unit is spoiled.

        A failure that is tried again within a second is kept in memory; only its claim is looked for, because
        later, or elsewhere, nobody knows whose claim that is, and it passes for a repeat.
        """
        assert job.outcome is not None
        self._guard.hold()  # an async handler's failure was seen to in a task of its own
        self._transaction = begin(self.connection)
        if (release := self._released(job, job.outcome)) is not None:
            self._transaction.rollback()
            job.outcome = None
            return release
        try:
            limit = self._consumer.max_kept
            verdict = failures.put(self.connection, self._ledger, self._number, job, job.outcome, limit)
        except TooLarge as error:
            self._transaction.rollback()
            if job.outcome.reason in (failures.RELEASED, failures.BEHIND):  # it may be done yet
                job.outcome = None
                return Release(str(error))
            return Release(str(error), stop=True)
        if verdict is None:
            self._transaction.rollback()
            return Ack(duplicate=True)
        if self._trigger:
            allow_commit(self.connection)
        return self._commit(verdict)

    def _released(self, job: Job, outcome: Outcome) -> Release | None:
        """The message stays in the worker, unless the attempt that failed has committed its claim."""
        if outcome.reason != failures.CONTENTION:
            if job.row is not None or outcome.delay is None or outcome.reason not in (FAILED, LATER):
                return None
            if self._consumer.parks and (outcome.delay > SHORT or monotonic() - job.began > KEEP):
                return None
        if job.tokens:
            assert job.key is not None
            if self._ledger.token(self.connection, self._number, job.key) in job.tokens:
                return None
        delay = outcome.delay if self._consumer.policy is not None else None
        return Release(outcome.cause, failed=outcome.reason == FAILED, delay=delay)

    def waiting(self) -> Parking:
        """The messages of this consumer that wait in the database, to be looked at between two attempts."""
        self._guard.hold()
        return self.parking

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


def released(error: BaseException) -> Release:
    """The verdict of an attempt that ended in an error outside the handler: never counted as a failure."""
    if isinstance(error, InFlight):
        return Release("its twin is still in flight", twin=True)
    all_alike = isinstance(error, OperationalError | ProgrammingError)  # a missing table, say
    contention = isinstance(error, DBAPIError) and is_contention(error)
    return Release(words(error), outage=is_outage(error) or (all_alike and not contention))
