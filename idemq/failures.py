"""Dead letters: a message that will not be run is written down whole, together with its claim.

Guaranteed: when `bury` returns `Dead` and the caller's transaction commits, exactly one row holds the message
with its body and headers byte for byte; a copy of it is absorbed by the claim, or counted in that row.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, Table, insert, update

from idemq import schema
from idemq.ledger import Ledger
from idemq.message import Ack, Dead, Message, Verdict

#: `idemq_failed.state`.
WAITING, DEAD = 1, 2

#: Reasons under which a dead letter is filed.
BROKE, CONFLICT, REJECTED = "broke its transaction", "conflict", "rejected"

#: The longest error text that is kept, in characters; the middle is cut.
MAX_ERROR = 20_000

#: How deep header tables may be nested before the rest is left out.
MAX_DEPTH = 100

#: Headers that the broker changes from delivery to delivery.
_PER_DELIVERY = ("x-delivery-count", "x-death", "x-acquired-count")


@dataclass(slots=True)
class Job:
    """One delivery's message on its way to a verdict, over all of its attempts in this process."""

    message: Message
    #: None when the message has no usable id.
    key: bytes | None
    fingerprint: int | None
    #: Why it cannot be judged, else None.
    bad: Exception | None = None
    #: Claims that this delivery's attempts wrote and that idemq did not commit.
    tokens: set[str | bytes] = field(default_factory=set)
    failures: int = 0


def bury(
    connection: Connection, ledger: Ledger, consumer: int, job: Job, reason: str, error: BaseException | None
) -> Verdict:
    """Write the dead letter and its claim in the caller's transaction.

    `Ack(duplicate=True)`: another delivery has processed or buried the message; nothing was written.
    """
    owns = False
    if job.key is not None:
        claim = ledger.claim(connection, consumer, job.key, job.fingerprint, job.message.sent_at)
        if claim.state == "conflict":
            reason = CONFLICT
        elif claim.state == "fresh":
            owns = True
        elif claim.token in job.tokens:
            reason, owns = BROKE, True
        else:
            return Ack(duplicate=True)
    identity = job.key if owns and job.key is not None else _identity(job)
    table = schema.table("idemq_failed", ledger.schema)
    if not _counted_as_copy(connection, table, consumer, identity):
        row = _row(job, reason, error)
        values = {"pk": uuid4().bytes, "consumer": consumer, "identity": identity, "owns_claim": owns, **row}
        connection.execute(insert(table).values(values))
    return Dead(reason)


def _counted_as_copy(connection: Connection, table: Table, consumer: int, identity: bytes) -> bool:
    same = (table.c.consumer == consumer) & (table.c.identity == identity)
    changes = {"copies": table.c.copies + 1, "last_at": datetime.now(UTC)}
    return connection.execute(update(table).where(same).values(changes)).rowcount > 0


def _row(job: Job, reason: str, error: BaseException | None) -> dict[str, Any]:
    message, now = job.message, datetime.now(UTC)
    return {
        "state": DEAD,
        "reason": reason,
        "attempts": job.failures,
        "fingerprint": job.fingerprint,
        "sent_at": message.sent_at,
        "body": message.body,
        "headers": packed(message.headers),
        "properties": packed(_properties(message)),
        "origin": packed(message.origin),
        "error": error_text(error) if error is not None else None,
        "first_at": now,
        "last_at": now,
    }


def _properties(message: Message) -> dict[str, Any]:
    return {
        **message.properties,
        "message_id": message.id,
        "key": message.key,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
    }


def _identity(job: Job) -> bytes:
    """What makes two copies of a message without a claim of its own the same.

    A digest of a kind of its own: no id that somebody chooses can have it as its key.
    """
    message = job.message
    parts: dict[str, Any] = {"key": job.key, "tombstone": message.body is None}
    if job.key is None:
        parts["headers"] = {name: each for name, each in message.headers.items() if not _changes(name)}
        parts["properties"] = _properties(message)
        parts["origin"] = message.origin if "offset" in message.origin else None
    digest = blake2b(packed(parts), digest_size=16, person=b"idemq identity")
    digest.update(message.body or b"")  # last, because its length is not written
    return digest.digest()


def _changes(header: str) -> bool:
    return header in _PER_DELIVERY or header.startswith(("x-first-death-", "x-last-death-"))


def packed(values: Mapping[str, Any]) -> bytes:
    """MessagePack that keeps text and bytes apart and never refuses: what it has no type for becomes text."""
    return msgspec.msgpack.encode(_plain(dict(values)))


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        return "(nested too deep)"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # lone surrogates: kept as the bytes that they stand for
            return value.encode("utf-8", "surrogatepass")
        return value
    if isinstance(value, Mapping):
        return {_name(name): _plain(each, depth + 1) for name, each in value.items()}
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(each, depth + 1) for each in value]
    if isinstance(value, bool | int | float | bytes | bytearray | memoryview | datetime | None):
        big = isinstance(value, int) and not -(2**63) <= value < 2**64
        return str(value) if big else value
    return _plain(str(value))


def _name(name: object) -> str:
    return str(name).encode("utf-8", "replace").decode()


def error_text(error: BaseException) -> str:
    """The traceback as text that every database stores: no NUL, no lone surrogate, not too long."""
    text = "".join(traceback.format_exception(error))
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\\x00")
    half = MAX_ERROR // 2
    return text if len(text) <= MAX_ERROR else f"{text[:half]}\n[...]\n{text[-half:]}"
