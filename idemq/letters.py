"""Dead letters in people's hands: looked at, tried again, dropped.

Guaranteed: only a dead letter is retried or dropped, each by one caller, and in the same transaction
`idemq_audit` records who did it, when and why. A retry keeps the message's id and its claim. The caller owns
the transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Unpack
from uuid import UUID

from sqlalchemy import Connection, Table, case, delete, insert, select, text, update

from idemq import schema as tables
from idemq.drivers import kind_of
from idemq.errors import Crashed, SetupError
from idemq.failed_rows import Letter as Letter
from idemq.failed_rows import Match as Match
from idemq.failed_rows import Which, chosen, chunks
from idemq.failed_rows import dead_letters as dead_letters
from idemq.failed_rows import find as find
from idemq.failed_rows import letter as letter
from idemq.failed_rows import matching as matching
from idemq.failed_rows import parked as parked
from idemq.failures import BROKE, CONFLICT, DEAD, FAILED, WAITING
from idemq.ledger import NOW
from idemq.scopes import begin
from idemq.status import Status as Status
from idemq.status import status as status


class Entry(NamedTuple):
    """One line of the audit."""

    at: datetime
    who: str
    action: str
    #: Why the letter was dead.
    reason: str
    why: str | None


def history(connection: Connection, pk: UUID, *, schema: str | None = None) -> list[Entry]:
    """What people did to a letter, the oldest first; also when it is gone."""
    table = tables.table("idemq_audit", schema)
    query = select(table.c.at, table.c.who, table.c.action, table.c.reason, table.c.why)
    rows = connection.execute(query.where(table.c.pk == pk.bytes).order_by(table.c.seq))
    return [Entry(*row) for row in rows]


def refusal(reason: str, *, force: bool = False) -> str | None:
    """Why a letter that is dead for `reason` is not retried; None when it is."""
    if reason == CONFLICT:
        return "its id was processed with another body: publish it anew, with an id of its own"
    if reason == BROKE and not force:
        return "what its handler committed is there, and a retry does it again: that needs force"
    return None


def retry(
    connection: Connection,
    *,
    by: str,
    why: str | None = None,
    force: bool = False,
    schema: str | None = None,
    **which: Unpack[Which],
) -> int:
    """Make dead letters wait for a worker, due now and with fresh counts; how many it were.

    What `refusal` names is left as it is. A letter without an id is judged anew. Once more changes nothing.
    """
    refused = [reason for reason in (CONFLICT, BROKE) if refusal(reason, force=force)]
    fresh = {"attempts": 0, "crashes": 0, "alone": False, "owner": None, "lease_until": None}

    def wait(table: Table, now: Any) -> Any:
        times = {"not_before": now, "last_at": now, "first_at": now}  # its policy begins anew
        alone = case((table.c.reason == Crashed.reason, 1), else_=0)  # what ended processes runs alone again
        return update(table).values(state=WAITING, reason=FAILED, starts=alone, **fresh, **times)

    return _act(connection, schema, which, wait, refused, action="retry", who=by, why=why)


def drop(
    connection: Connection, *, by: str, why: str, schema: str | None = None, **which: Unpack[Which]
) -> int:
    """Delete dead letters for good; how many it were.

    Their claims stay, so that a late copy is absorbed as before; one that had no claim comes back with one.
    """
    if not _storable(why):
        raise SetupError("a drop is for good: say why")
    return _act(connection, schema, which, lambda table, _: delete(table), (), action="drop", who=by, why=why)


def _act(
    connection: Connection,
    schema: str | None,
    which: Which,
    change: Callable[[Table, Any], Any],
    refused: Sequence[str],
    **entry: str | None,
) -> int:
    entry = {name: _storable(value) for name, value in entry.items()}
    if not entry["who"]:
        raise SetupError("say who does it: by=")
    begin(connection)
    table, audit = tables.table("idemq_failed", schema), tables.table("idemq_audit", schema)
    moment = text(NOW[kind_of(connection.dialect)])
    statement = change(table, moment)
    wanted = (table.c.state == DEAD) & table.c.reason.not_in(refused)
    found = [row.pk for row in chosen(connection, schema, DEAD, which, [table.c.pk], wanted)]
    columns = [table.c[name] for name in ("pk", "consumer", "identity", "reason")]
    done = 0
    for pks in chunks(sorted(found)):
        # Who holds the rows' locks has them, whoever chose them before; taken in one order by everybody.
        lock = select(*columns).where(table.c.pk.in_(pks), wanted).order_by(table.c.pk).with_for_update()
        rows = connection.execute(lock).mappings().all()
        if rows:
            connection.execute(insert(audit).values(at=moment, **entry), [dict(row) for row in rows])
            connection.execute(statement.where(table.c.pk.in_([row["pk"] for row in rows]), wanted))
            done += len(rows)
    return done


def _storable(value: str | None) -> str | None:
    """As every database takes it: no NUL, no lone surrogate."""
    return None if value is None else value.encode("utf-8", "replace").decode().replace("\0", " ").strip()
