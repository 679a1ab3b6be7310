"""The rows of `idemq_failed` as people see them: chosen, read, and nothing written.

Guaranteed: a body is read for one letter only, so that a list of many stays small. Moments are the
database's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, func, select

from idemq import names
from idemq import schema as tables
from idemq.errors import SetupError
from idemq.failures import DEAD, WAITING
from idemq.ledger import clock
from idemq.message import Message
from idemq.packing import as_text, message_of, unpacked

#: How many rows one statement names.
CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A message that is waiting to be tried again, or dead."""

    pk: UUID
    consumer: str
    #: The message id; None when it has none.
    id: str | None
    state: Literal["waiting", "dead"]
    reason: str
    #: Its claim is its own, so copies of it are absorbed.
    owns_claim: bool
    attempts: int
    starts: int
    crashes: int
    #: Somebody runs it now, or died while running it.
    held: bool
    #: How often it came; counted only where it has no claim.
    copies: int
    #: Bytes of the body; None for a Kafka tombstone.
    size: int | None
    origin: dict[str, Any]
    #: The last error with its traceback.
    error: str | None
    sent_at: datetime | None
    #: When a waiting one may run.
    not_before: datetime | None
    first_at: datetime
    last_at: datetime
    #: Only from `letter`: body, headers and properties byte for byte.
    message: Message | None = None


class Which(TypedDict, total=False):
    """What chooses letters; all that are given must hold, and without any all letters are chosen."""

    consumer: str | None
    reason: str | None
    #: Dead letters by the time since they went dead, waiting ones since they first failed.
    older_than: timedelta | None
    newer_than: timedelta | None
    ids: Collection[UUID] | None
    #: At most so many, those that came first.
    limit: int | None


class Match(NamedTuple):
    """A chosen letter, without what is large."""

    pk: UUID
    consumer: str
    reason: str


def dead_letters(
    connection: Connection, *, schema: str | None = None, **which: Unpack[Which]
) -> list[Letter]:
    """The dead letters, those that came first at the beginning."""
    return _letters(connection, schema, DEAD, which)


def parked(connection: Connection, *, schema: str | None = None, **which: Unpack[Which]) -> list[Letter]:
    """The messages that wait to be tried again, those that came first at the beginning."""
    return _letters(connection, schema, WAITING, which)


def matching(connection: Connection, *, schema: str | None = None, **which: Unpack[Which]) -> list[Match]:
    """The dead letters that `retry` and `drop` would be done to, also where they are too many to read."""
    table = tables.table("idemq_failed", schema)
    named = _names(connection, schema, which.get("consumer"))
    rows = chosen(connection, schema, DEAD, which, [table.c.pk, table.c.consumer, table.c.reason])
    return [Match(UUID(bytes=row.pk), named(row.consumer), row.reason) for row in rows]


def letter(connection: Connection, pk: UUID, *, schema: str | None = None) -> Letter | None:
    """One letter, waiting or dead, with its message."""
    table = tables.table("idemq_failed", schema)
    row = connection.execute(select(table, _size(table)).where(table.c.pk == pk.bytes)).first()
    return None if row is None else _letter(row, _names(connection, schema), message_of(row._mapping))


def find(connection: Connection, prefix: str, *, schema: str | None = None) -> list[Letter]:
    """The letters, waiting or dead, whose pk begins with `prefix` (hexadecimal digits); at most ten."""
    if (span := tables.span(prefix)) is None:
        raise SetupError(f"{prefix!r} is no id of a letter: `idemq dead list` shows them")
    table = tables.table("idemq_failed", schema)
    query = select(*_columns(table)).where(table.c.pk.between(*span)).order_by(table.c.seq).limit(10)
    named = _names(connection, schema)
    return [_letter(row, named) for row in connection.execute(query)]


def chosen(
    connection: Connection,
    schema: str | None,
    state: int,
    which: Which,
    columns: Sequence[ColumnElement[Any]],
    *more: ColumnElement[bool],
) -> Sequence[Row[Any]]:
    table = tables.table("idemq_failed", schema)
    since = table.c.last_at if state == DEAD else table.c.first_at
    conditions = [table.c.state == state, *more]
    if (consumer := which.get("consumer")) is not None:
        conditions.append(table.c.consumer == names.wanted(connection, consumer, schema))
    if (reason := which.get("reason")) is not None:
        conditions.append(table.c.reason == reason)
    older, newer = which.get("older_than"), which.get("newer_than")
    if older is not None or newer is not None:
        moment = clock(connection)
        conditions += [since < moment - older] if older is not None else []
        conditions += [since > moment - newer] if newer is not None else []
    query = select(*columns).where(*conditions).order_by(table.c.seq).limit(which.get("limit"))
    if (ids := which.get("ids")) is None:
        return connection.execute(query).all()
    rows = [
        row
        for pks in chunks([pk.bytes for pk in ids])
        for row in connection.execute(query.where(table.c.pk.in_(pks)))
    ]
    return rows[: which.get("limit")]


def _letters(connection: Connection, schema: str | None, state: int, which: Which) -> list[Letter]:
    table = tables.table("idemq_failed", schema)
    named = _names(connection, schema, which.get("consumer"))
    return [_letter(row, named) for row in chosen(connection, schema, state, which, _columns(table))]


def _columns(table: Table) -> list[ColumnElement[Any]]:
    large = ("body", "headers")
    columns: list[Column[Any]] = [column for column in table.columns if column.name not in large]
    return [*columns, _size(table)]


def _size(table: Table) -> ColumnElement[int]:
    return func.length(table.c.body).label("size")


def _letter(row: Row[Any], named: Callable[[int], str], message: Message | None = None) -> Letter:
    return Letter(
        pk=UUID(bytes=row.pk),
        consumer=named(row.consumer),
        id=as_text(unpacked(row.properties).get("message_id")),
        state="dead" if row.state == DEAD else "waiting",
        reason=row.reason,
        owns_claim=row.owns_claim,
        attempts=row.attempts,
        starts=row.starts,
        crashes=row.crashes,
        held=row.owner is not None,
        copies=row.copies,
        size=row.size,
        origin=unpacked(row.origin),
        error=row.error,
        sent_at=row.sent_at,
        not_before=row.not_before,
        first_at=row.first_at,
        last_at=row.last_at,
        message=message,
    )


def _names(connection: Connection, schema: str | None, wanted: str | None = None) -> Callable[[int], str]:
    """A consumer's name by its number: `wanted`, where only that one is asked for."""
    if wanted is not None:
        return lambda _: wanted
    return names.known(connection, schema).__getitem__


def chunks(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK))
