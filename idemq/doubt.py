"""Effects in people's hands: what nobody knows of, or what has failed; looked at, and decided.

Guaranteed: only an effect that is in doubt or failed is decided, each by one caller, whoever else finds out
about it at the same moment; and in the same transaction `idemq_audit` records who did it, when and why. The
caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Row, Table, delete, func, select, text, update

from idemq import audit
from idemq import schema as tables
from idemq.audit import Entry as Entry
from idemq.audit import history as history
from idemq.drivers import kind_of
from idemq.errors import SetupError
from idemq.ledger import NOW, clock
from idemq.outgoing import EFFECT, FAILED, IN_DOUBT, SENDING, WAITING
from idemq.scopes import begin

State = Literal["waiting", "sending", "in doubt", "failed"]

#: `idemq_outgoing.state`, in words.
STATES: dict[int, State] = {WAITING: "waiting", SENDING: "sending", IN_DOUBT: "in doubt", FAILED: "failed"}

#: What a person may say of an effect: it is there; it is not, and is to be sent; it is given up.
Decision = Literal["done", "resend", "failed"]
DECISIONS: tuple[Decision, ...] = ("done", "resend", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """An effect that has not ended."""

    #: The provider key.
    key: UUID
    effect: str
    state: State
    #: How many attempts were begun.
    attempts: int
    planned_at: datetime
    #: When the first attempt was begun of those that may have got through.
    first_sending_at: datetime | None
    last_at: datetime
    #: When it is sent, or looked at again, by itself; None: a person decides.
    due: datetime | None
    #: The last error with its traceback.
    error: str | None
    #: Bytes of the payload.
    size: int | None
    #: Only from `effect`: as every attempt gets it, JSON.
    payload: bytes | None = None


def in_doubt(
    connection: Connection,
    *,
    effect: str | None = None,
    state: Literal["in doubt", "failed"] | None = None,
    older_than: timedelta | None = None,
    limit: int | None = None,
    schema: str | None = None,
) -> list[Doubt]:
    """The effects that are in doubt or failed, those that were planned first at the beginning.

    `older_than`: only those that were planned longer ago.
    """
    table = tables.table("idemq_outgoing", schema)
    wanted = [number for number in (IN_DOUBT, FAILED) if state in (None, STATES[number])]
    conditions = [table.c.kind == EFFECT, table.c.state.in_(wanted)]
    if effect is not None:
        conditions.append(table.c.target == effect.encode())
    if older_than is not None:
        conditions.append(table.c.at < clock(connection) - older_than)
    query = select(*_columns(table)).where(*conditions).order_by(table.c.seq).limit(limit)
    return [_doubt(row) for row in connection.execute(query)]


def effect(connection: Connection, key: UUID, *, schema: str | None = None) -> Doubt | None:
    """One effect, in whatever state, with its payload; None when it has ended, or never was."""
    table = tables.table("idemq_outgoing", schema)
    columns = [*_columns(table), table.c.body]
    query = select(*columns).where(table.c.kind == EFFECT, table.c.pk == key.bytes)
    row = connection.execute(query).first()
    return None if row is None else _doubt(row, row.body)


def find(connection: Connection, prefix: str, *, schema: str | None = None) -> list[Doubt]:
    """The effects, in whatever state, whose key begins with `prefix` (hexadecimal digits); at most ten."""
    if (span := tables.span(prefix)) is None:
        raise SetupError(f"{prefix!r} is no id of an effect: `idemq doubt list` shows them")
    table = tables.table("idemq_outgoing", schema)
    these = (table.c.kind == EFFECT) & table.c.pk.between(*span)
    query = select(*_columns(table)).where(these).order_by(table.c.seq).limit(10)
    return [_doubt(row) for row in connection.execute(query)]


def resolve(
    connection: Connection,
    key: UUID,
    decision: Decision,
    *,
    by: str,
    why: str,
    state: State | None = None,
    attempts: int | None = None,
    schema: str | None = None,
) -> bool:
    """Decide about an effect that is in doubt or failed; whether it was done.

    "done": it is there, and ends. "resend": it is not there; it is sent again now, with the same key and
    payload. "failed": it is given up, and ends. `state` and `attempts`: as they were seen. False: it is not
    as it was seen, because somebody else was first, or it is being sent.
    """
    if decision not in DECISIONS:
        raise SetupError(f"{decision!r} is no decision: 'done', 'resend' or 'failed'")
    signature = audit.signed(decision, by, why)
    if signature["why"] is None:
        raise SetupError("a decision about an effect is for good: say why")
    begin(connection)
    table = tables.table("idemq_outgoing", schema)
    found = connection.execute(
        select(table.c.seq, table.c.target).where(table.c.kind == EFFECT, table.c.pk == key.bytes)
    ).first()
    if found is None:
        return False
    # By its number, as the relay does it: whoever locks two indexes in another order is a deadlock on MySQL.
    which: list[ColumnElement[bool]] = [table.c.seq == found.seq, table.c.state.in_((IN_DOUBT, FAILED))]
    if state is not None:
        which.append(table.c.state.in_([number for number, words in STATES.items() if words == state]))
    if attempts is not None:
        which.append(table.c.attempts == attempts)
    change = _sent_again(connection, table) if decision == "resend" else delete(table)
    if connection.execute(change.where(*which)).rowcount == 0:  # of an update or a delete
        return False
    name = found.target.decode().replace("\0", " ").encode("ascii", "backslashreplace").decode()
    entry = {"pk": key.bytes, "consumer": 0, "identity": key.bytes, "reason": name[:40]}
    audit.record(connection, signature, [entry], schema)
    return True


def _sent_again(connection: Connection, table: Table) -> Any:
    """Nothing has got through, says a person. The attempts stay: they fence what comes late of the last."""
    now = text(NOW[kind_of(connection.dialect)])
    free = {"owner": None, "lease_until": None, "first_sending_at": None}
    return update(table).values(state=WAITING, not_before=now, last_at=now, **free)


def _columns(table: Table) -> Sequence[ColumnElement[Any]]:
    names = ("pk", "target", "state", "attempts", "at", "first_sending_at", "last_at", "not_before", "error")
    columns: list[Column[Any]] = [table.c[name] for name in names]
    return [*columns, func.length(table.c.body).label("size")]


def _doubt(row: Row[Any], payload: bytes | None = None) -> Doubt:
    return Doubt(
        key=UUID(bytes=row.pk),
        effect=row.target.decode(),
        state=STATES[row.state],
        attempts=row.attempts,
        planned_at=row.at,
        first_sending_at=row.first_sending_at,
        last_at=row.last_at,
        due=row.not_before,
        error=row.error,
        size=row.size,
        payload=payload,
    )
