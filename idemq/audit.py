"""`idemq_audit`: what people did, when and why, written in the same transaction as what they did."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, insert, select, text

from idemq import schema as tables
from idemq.drivers import kind_of
from idemq.errors import SetupError
from idemq.ledger import NOW


class Entry(NamedTuple):
    """One line of the audit."""

    at: datetime
    who: str
    action: str
    #: Why the letter was dead; of an effect its name.
    reason: str
    why: str | None


def history(connection: Connection, pk: UUID, *, schema: str | None = None) -> list[Entry]:
    """What people did to a letter or an effect, the oldest first; also when it is gone."""
    table = tables.table("idemq_audit", schema)
    query = select(table.c.at, table.c.who, table.c.action, table.c.reason, table.c.why)
    rows = connection.execute(query.where(table.c.pk == pk.bytes).order_by(table.c.seq))
    return [Entry(*row) for row in rows]


def signed(action: str, by: str, why: str | None) -> dict[str, Any]:
    """What is the same in all entries of one act. Raises `SetupError` when nobody does it."""
    who = _storable(by)
    if not who:
        raise SetupError("say who does it: by=")
    return {"action": action, "who": who, "why": None if why is None else _storable(why) or None}


def record(
    connection: Connection, signature: dict[str, Any], rows: Sequence[dict[str, Any]], schema: str | None
) -> None:
    """Write an entry for each row: its pk, consumer (0: an effect), identity and reason."""
    moment = text(NOW[kind_of(connection.dialect)])
    connection.execute(insert(tables.table("idemq_audit", schema)).values(at=moment, **signature), list(rows))


def _storable(value: str) -> str:
    """As every database takes it: no NUL, no lone surrogate."""
    return value.encode("utf-8", "replace").decode().replace("\0", " ").strip()
