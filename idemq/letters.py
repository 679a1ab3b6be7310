"""Dead letters in people's hands: looked at, tried again, dropped.

Guaranteed: only a dead letter is retried or dropped, each by one caller, and in the same transaction
`idemq_audit` records who did it, when and why. A retry keeps the message's id and its claim. The caller owns
the transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from sqlalchemy import Connection, Table, case, delete, select, text, update

from idemq import audit
from idemq import schema as tables
from idemq.audit import Entry as Entry
from idemq.audit import history as history
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

    return _act(connection, schema, which, wait, refused, audit.signed("retry", by, why))


def drop(
    connection: Connection, *, by: str, why: str, schema: str | None = None, **which: Unpack[Which]
) -> int:
    """Delete dead letters for good; how many it were.

    Their claims stay, so that a late copy is absorbed as before; one that had no claim comes back with one.
    """
    signature = audit.signed("drop", by, why)
    if signature["why"] is None:
        raise SetupError("a drop is for good: say why")
    return _act(connection, schema, which, lambda table, _: delete(table), (), signature)


def _act(
    connection: Connection,
    schema: str | None,
    which: Which,
    change: Callable[[Table, Any], Any],
    refused: Sequence[str],
    signature: dict[str, Any],
) -> int:
    begin(connection)
    table = tables.table("idemq_failed", schema)
    statement = change(table, text(NOW[kind_of(connection.dialect)]))
    wanted = (table.c.state == DEAD) & table.c.reason.not_in(refused)
    found = [row.pk for row in chosen(connection, schema, DEAD, which, [table.c.pk], wanted)]
    columns = [table.c[name] for name in ("pk", "consumer", "identity", "reason")]
    done = 0
    for pks in chunks(sorted(found)):
        # Who holds the rows' locks has them, whoever chose them before; taken in one order by everybody.
        lock = select(*columns).where(table.c.pk.in_(pks), wanted).order_by(table.c.pk).with_for_update()
        rows = connection.execute(lock).mappings().all()
        if rows:
            audit.record(connection, signature, [dict(row) for row in rows], schema)
            connection.execute(statement.where(table.c.pk.in_([row["pk"] for row in rows]), wanted))
            done += len(rows)
    return done
