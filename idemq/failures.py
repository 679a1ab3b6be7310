"""Failures are rows: what is not done is written down whole, with its claim, and only then acknowledged.

Guaranteed: when the caller's transaction commits what `put` wrote, exactly one row holds the message, with
its body and headers byte for byte, waiting for its next attempt or dead; a copy of it is absorbed by the
claim, or counted in that row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from time import monotonic
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Table, delete, insert, select, update

from idemq import schema
from idemq.drivers import too_small_packet
from idemq.errors import BadMessage, BrokeTransaction, IdemqError
from idemq.ledger import Ledger, clock
from idemq.message import Ack, Dead, Message, Parked, Verdict
from idemq.packing import error_text, kept, packed, properties_of

#: `idemq_failed.state`.
WAITING, DEAD = 1, 2

#: Reasons under which a dead letter is filed.
BROKE, CONFLICT, REJECTED, USED_UP = "broke its transaction", "conflict", "rejected", "retries used up"
TOO_OLD, UNDATED = "too old", "undated"
#: Those of messages that cannot be judged.
JUDGED_BAD = ("no id", "unreadable", TOO_OLD, UNDATED)
#: Reasons for which a row waits.
FAILED, LATER, SUSPECT, RELEASED = "failed", "later", "suspect", "released"
#: Never written down: it is tried again where it is, because another transaction was in its way.
CONTENTION = "contention"
#: Waits behind another one of its key.
BEHIND = "behind"

#: The largest message that is written down unless the consumer says otherwise, body and headers, in bytes.
MAX_KEPT = 16 * 1024 * 1024

#: Headers that the broker changes from delivery to delivery.
_PER_DELIVERY = ("x-delivery-count", "x-death", "x-acquired-count")


class TooLarge(IdemqError):
    """The message is larger than what the failure table keeps."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is to be written down about a message: dead now (`delay` None), or waiting for `delay` seconds."""

    reason: str
    error: BaseException | None = None
    delay: float | None = None
    cause: str = ""

    def verdict(self) -> Verdict:
        return Dead(self.reason) if self.delay is None else Parked(self.reason, self.delay, self.cause)


@dataclass(slots=True)
class Row:
    """A row of `idemq_failed` that this worker has picked to run. Lost when its `owner` is no more there."""

    pk: bytes
    owner: bytes
    owns_claim: bool
    #: Its place among the rows of its key.
    seq: int


@dataclass(slots=True)
class Job:
    """One message on its way to a verdict, over all of its attempts in this process."""

    message: Message
    #: None when the message has no usable id.
    key: bytes | None
    fingerprint: int | None
    #: Why it cannot be judged, else None.
    bad: BadMessage | None = None
    #: It may have ended the process that had it before.
    suspect: bool = False
    #: To be written down by the next transaction instead of an attempt.
    outcome: Outcome | None = None
    #: Where the message comes from when it was parked.
    row: Row | None = None
    #: What keeps it in order with others, for a consumer that asked for that.
    lane: bytes | None = None
    #: Claims that this delivery's attempts wrote and that idemq did not commit.
    tokens: set[str | bytes] = field(default_factory=set)
    #: Attempts that the handler failed, also those before it was parked.
    failures: int = 0
    #: Deadlocks and the like in a row, which are not counted as failures until there are too many.
    contended: int = 0
    #: Connections that were lost while its handler ran.
    lost: int = 0
    #: When the handler must be done, and when the first attempt began, on the monotonic clock.
    deadline: float | None = None
    began: float = field(default_factory=monotonic)

    def burial(self) -> Outcome | None:
        """What is to be written down of a message that cannot be judged."""
        return Outcome(self.bad.reason, self.bad) if self.bad is not None else None


def put(
    connection: Connection, ledger: Ledger, consumer: int, job: Job, outcome: Outcome, limit: int = MAX_KEPT
) -> Verdict | None:
    """Write `outcome` in the caller's transaction, with the claim where the message has an id.

    `Ack(duplicate=True)`: another delivery has done or written down the message. None: the same, and the
    caller must roll back, because the row that the message came from is somebody else's now. Raises
    `TooLarge` for a new row over `limit` bytes.
    """
    row, owns = job.row, job.row is not None and job.row.owns_claim
    table = schema.table("idemq_failed", ledger.schema)
    if job.key is not None and not owns and outcome.reason != RELEASED:
        claim = ledger.claim(connection, consumer, job.key, job.fingerprint, job.message.sent_at)
        if claim.state == "conflict":
            outcome = Outcome(CONFLICT, outcome.error)
        elif claim.state == "fresh":
            owns = True
        elif claim.token in job.tokens:
            outcome, owns = _broke(outcome), True
        else:
            if row is not None:
                _give_way(connection, table, consumer, job, row)
            return Ack(duplicate=True)
    now = clock(connection)
    changes = _changes(job, outcome, now)
    if owns:
        changes |= {"owns_claim": True, "identity": job.key}
    if row is not None:
        if connection.execute(update(table).where(mine(table, row)).values(changes)).rowcount:
            return outcome.verdict()
        # An attempt that committed too early has deleted the row; otherwise its lease was lost.
        if job.key is None or not _ours(connection, ledger, consumer, job):
            return None
        outcome, owns = _broke(outcome), True
        changes = _changes(job, outcome, now) | {"owns_claim": True, "identity": job.key}
    if not owns:
        changes |= {"owns_claim": False, "identity": _identity(job)}
    if _counted_as_copy(connection, table, consumer, changes["identity"], now):
        return outcome.verdict()
    _insert(connection, ledger, table, job, {**changes, "consumer": consumer, "first_at": now}, limit)
    return outcome.verdict()


def _insert(
    connection: Connection, ledger: Ledger, table: Table, job: Job, values: dict[str, Any], limit: int
) -> None:
    whole = kept(job.message, judged=job.key is not None)
    if job.row is None:  # else nobody else has it any more
        _refuse_too_large(connection, whole, limit)
    whole |= {**values, "lane": job.lane, "fingerprint": job.fingerprint}
    connection.execute(insert(table).values(pk=uuid4().bytes, **whole))


def _give_way(connection: Connection, table: Table, consumer: int, job: Job, row: Row) -> None:
    """The row of a message that was parked unclaimed goes. Where who had the claim has parked it as well,
    that row gets its place, before those that were parked behind it."""
    if connection.execute(delete(table).where(mine(table, row))).rowcount and job.lane is not None:
        twin = (table.c.consumer == consumer) & (table.c.identity == job.key) & (table.c.seq > row.seq)
        connection.execute(update(table).where(twin).values(seq=row.seq))


def _changed(connection: Connection, table: Table, which: Any, changes: dict[str, Any]) -> bool:
    """Change the row, if it is there. Raises at once where somebody has it who runs it, maybe for long."""
    locked = select(table.c.seq).where(which).with_for_update(nowait=True)
    row = connection.execute(locked).first()
    if row is not None:
        connection.execute(update(table).where(table.c.seq == row.seq).values(changes))
    return row is not None


def mine(table: Table, row: Row) -> Any:
    """The condition that a row is still the one that we picked.

    One that was run in the meantime, and picked again by another lane of this worker, has its claim now.
    """
    return (table.c.pk == row.pk) & (table.c.owner == row.owner) & (table.c.owns_claim == row.owns_claim)


def _broke(outcome: Outcome) -> Outcome:
    return Outcome(BROKE, outcome.error or BrokeTransaction("an attempt committed its claim too early"))


def _ours(connection: Connection, ledger: Ledger, consumer: int, job: Job) -> bool:
    assert job.key is not None
    return ledger.token(connection, consumer, job.key) in job.tokens


def _counted_as_copy(
    connection: Connection, table: Table, consumer: int, identity: bytes, now: datetime
) -> bool:
    same = (table.c.consumer == consumer) & (table.c.identity == identity)
    return _changed(connection, table, same, {"copies": table.c.copies + 1, "last_at": now})


def _changes(job: Job, outcome: Outcome, now: datetime) -> dict[str, Any]:
    waits = outcome.delay is not None
    changes = {
        "state": WAITING if waits else DEAD,
        "reason": outcome.reason,
        "not_before": now + timedelta(seconds=outcome.delay) if outcome.delay is not None else None,
        "attempts": job.failures,
        "alone": False,
        "owner": None,
        "lease_until": None,
        "error": error_text(outcome.error) if outcome.error is not None else None,
        "last_at": now,
    }
    if outcome.reason not in (RELEASED, BEHIND):  # not begun at all, so what is known of it stays
        # Of a suspect an earlier delivery was begun, and nobody knows how that ended.
        changes["starts"] = 1 if outcome.reason == SUSPECT else 0
    elif job.row is None and job.suspect:
        changes["starts"] = 1
    return changes


def _refuse_too_large(connection: Connection, kept: dict[str, Any], limit: int) -> None:
    parts = [part for part in kept.values() if isinstance(part, bytes)]
    size = sum(map(len, parts))
    if size > limit:
        raise TooLarge(f"a message of {size} bytes cannot be written down: max_kept={limit}")
    if (packet := too_small_packet(connection, parts)) is not None:
        raise TooLarge(f"a message of {size} bytes cannot be written down: max_allowed_packet={packet}")


def _identity(job: Job) -> bytes:
    """What makes two copies of a message without a claim of its own the same.

    A digest of a kind of its own: no id that somebody chooses can have it as its key.
    """
    message = job.message
    parts: dict[str, Any] = {"key": job.key, "tombstone": message.body is None}
    if job.key is None:
        parts["headers"] = {name: each for name, each in message.headers.items() if not _per_delivery(name)}
        parts["properties"] = properties_of(message)
        parts["sent_at"] = message.sent_at
        parts["origin"] = message.origin if "offset" in message.origin else None
    digest = blake2b(packed(parts), digest_size=16, person=b"idemq identity")
    digest.update(message.body or b"")  # last, because its length is not written
    return digest.digest()


def _per_delivery(header: str) -> bool:
    return header in _PER_DELIVERY or header.startswith(("x-first-death-", "x-last-death-"))


#: Turns a message into a job: the consumer's rules for id and fingerprint.
Judge = Callable[[Message], Job]
