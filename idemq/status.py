"""What the tables say about each consumer, and of what is to leave: an overview for people and programs.

Guaranteed: a number that is not exact says so, and the time it takes does not grow with the claims.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, case, func, select, text, true

from idemq import names, outgoing
from idemq import schema as tables
from idemq.drivers import kind_of
from idemq.failures import DEAD, SUSPECT, WAITING

#: Up to so many claims are counted one by one, which takes less than a second or so.
COUNTED = 1_000_000

#: How many of PostgreSQL's pages are looked at to estimate what is too much to count.
SAMPLED_PAGES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One consumer."""

    consumer: str
    #: Messages whose work is done and whose ids are not forgotten yet.
    processed: int
    #: How `processed` is meant; an estimate is PostgreSQL's only, other databases count a part.
    precision: Literal["exact", "estimate", "at least"]
    #: Waiting to be tried again.
    parked: int
    #: Of these, those that may have ended a process and run alone.
    suspects: int
    dead: int
    #: When the one that waits longest first failed.
    oldest_waiting: datetime | None
    #: When the next may run that nobody runs now.
    next_due: datetime | None


def status(connection: Connection, *, schema: str | None = None, counted: int = COUNTED) -> list[Status]:
    """Every consumer that ever ran on this database, by name.

    Above `counted` claims, `processed` is an estimate or a lower bound. Repeats that were skipped leave
    nothing in the database, so they are not told here; the worker's log counts them.
    """
    claims, precision = _claims(connection, schema, counted)
    dropped = _dropped(connection, schema)
    failed = {row.consumer: row for row in _failed(connection, schema)}
    return [
        _of(name, claims.get(number, 0) - dropped.get(number, 0), precision, failed.get(number))
        for number, name in sorted(names.known(connection, schema).items(), key=lambda each: each[1])
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """What is to leave for one broker, or by one effect."""

    kind: Literal["broker", "effect"]
    name: str
    #: It is one of those that were given; a row of another one waits until an app declares it.
    declared: bool
    waiting: int
    sending: int
    #: Only effects are ever in doubt, or fail.
    in_doubt: int
    failed: int
    #: When the one that waits longest was planned.
    oldest_waiting: datetime | None


def leaving(
    connection: Connection,
    *,
    brokers: Collection[str] = (),
    effects: Collection[str] = (),
    schema: str | None = None,
) -> list[Leaving]:
    """The given brokers and effects, and all others that rows are there for: brokers first, by name."""
    c = tables.table("idemq_outgoing", schema).c
    states = (outgoing.WAITING, outgoing.SENDING, outgoing.IN_DOUBT, outgoing.FAILED)
    leaves_as = case((c.kind == outgoing.EFFECT, outgoing.EFFECT), else_=outgoing.MESSAGE)
    query = select(
        leaves_as.label("leaves_as"),
        c.target,
        *(func.sum(case((c.state == state, 1), else_=0)) for state in states),
        func.min(case((c.state == outgoing.WAITING, c.at))),
    ).group_by("leaves_as", c.target)
    found = {(kind, target.decode()): counts for kind, target, *counts in connection.execute(query)}
    given = {(outgoing.MESSAGE, name) for name in brokers} | {(outgoing.EFFECT, name) for name in effects}
    targets = []
    for kind, name in sorted(given | found.keys()):
        waiting, sending, in_doubt, failed, oldest = found.get((kind, name), (0, 0, 0, 0, None))
        targets.append(
            Leaving(
                kind="broker" if kind == outgoing.MESSAGE else "effect",
                name=name,
                declared=(kind, name) in given,
                waiting=int(waiting),
                sending=int(sending),
                in_doubt=int(in_doubt),
                failed=int(failed),
                oldest_waiting=oldest,
            )
        )
    return targets


def _of(
    name: str, claims: int, precision: Literal["exact", "estimate", "at least"], failed: Row[Any] | None
) -> Status:
    return Status(
        consumer=name,
        processed=max(0, claims - (int(failed.claims) if failed else 0)),
        precision=precision,
        parked=int(failed.parked) if failed else 0,
        suspects=int(failed.suspects) if failed else 0,
        dead=int(failed.dead) if failed else 0,
        oldest_waiting=failed.oldest_waiting if failed else None,
        next_due=failed.next_due if failed else None,
    )


def _failed(connection: Connection, schema: str | None) -> list[Row[Any]]:
    c = tables.table("idemq_failed", schema).c
    waits = c.state == WAITING
    query = select(
        c.consumer,
        func.sum(case((waits, 1), else_=0)).label("parked"),
        func.sum(case((and_(waits, (c.starts > 0) | (c.reason == SUSPECT)), 1), else_=0)).label("suspects"),
        func.sum(case((c.state == DEAD, 1), else_=0)).label("dead"),
        func.sum(case((c.owns_claim == true(), 1), else_=0)).label("claims"),
        func.min(case((waits, c.first_at))).label("oldest_waiting"),
        func.min(case((and_(waits, c.owner.is_(None)), c.not_before))).label("next_due"),
    )
    return list(connection.execute(query.group_by(c.consumer)))


def _dropped(connection: Connection, schema: str | None) -> dict[int, int]:
    """Dropped dead letters left claims, but nothing was processed."""
    audit = tables.table("idemq_audit", schema).c
    claim = tables.table("idemq_processed", schema).c
    same = and_(audit.consumer == claim.consumer, audit.identity == claim.id, audit.action == "drop")
    query = select(audit.consumer, func.count()).join_from(audit.seq.table, claim.id.table, same)
    return dict(connection.execute(query.group_by(audit.consumer)).all())


def _claims(
    connection: Connection, schema: str | None, counted: int
) -> tuple[dict[int, int], Literal["exact", "estimate", "at least"]]:
    table = tables.table("idemq_processed", schema)
    part = select(table.c.consumer).limit(counted + 1).subquery()
    query = select(part.c.consumer, func.count()).group_by(part.c.consumer)
    found: dict[int, int] = dict(connection.execute(query).all())
    if sum(found.values()) <= counted:
        return found, "exact"
    if kind_of(connection.dialect) == "postgresql":
        return _estimated(connection, schema), "estimate"
    return found, "at least"


def _estimated(connection: Connection, schema: str | None) -> dict[int, int]:
    """From pages chosen at random: the share that was looked at is known, so the whole is."""
    table = tables.table("idemq_processed", schema)
    name = connection.dialect.identifier_preparer.format_table(table)
    pages = text(
        "SELECT coalesce(sum(pg_relation_size(relid)), pg_relation_size(to_regclass(:name)))"
        " / current_setting('block_size')::int FROM pg_partition_tree(to_regclass(:name))"
    )
    percent = min(100.0, 100.0 * SAMPLED_PAGES / max(1.0, float(connection.scalar(pages, {"name": name}))))
    sample = table.tablesample(func.system(percent))
    query = select(sample.c.consumer, func.count()).group_by(sample.c.consumer)
    return {consumer: round(count * 100 / percent) for consumer, count in connection.execute(query)}
