"""What leaves: messages to publish and effects to run, as rows of `idemq_outgoing`.

Guaranteed: a row is there if and only if the transaction that planned it committed, and it goes only when a
broker has confirmed its message, or when it is known that its effect was done. Its key never changes, so that
what is sent again can be told from what is new.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import takewhile
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    delete,
    func,
    insert,
    literal,
    select,
    text,
    update,
)

from idemq import names, schema
from idemq.drivers import begin, kind_of, too_small_packet
from idemq.ledger import NOW, clock
from idemq.message import Message
from idemq.packing import as_text, message_of, packed, properties_of, unpacked

#: `idemq_outgoing.kind`.
#: A reply that the broker does not take is given up after some tries: who asked has gone.
MESSAGE, EFFECT, REPLY = 1, 2, 3

#: `idemq_outgoing.state`. A message is never in doubt: who receives it removes duplicates.
WAITING, SENDING, IN_DOUBT, FAILED = 1, 2, 3, 4

#: How long a row belongs to the process that has picked it, in seconds, unless that renews it.
LEASE = 60.0

#: Where PostgreSQL tells of what was planned.
CHANNEL = "idemq_outgoing"
#: Relays of this process. What is planned in it is known to them; to tell others as well would have every
#: commit wait for the one before it, because PostgreSQL keeps notifications in the order of the commits.
relays: set[object] = set()

#: The largest message or payload, body and headers together, and the most that is picked at a time, in bytes.
MAX_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """A row that this process has picked."""

    pk: bytes
    seq: int
    kind: int
    address: tuple[str, ...]
    lane: bytes | None
    message: Message
    #: How many attempts were begun, with this one: it is the number that fences.
    attempts: int
    state: int
    #: When the first attempt was begun of those that may have got through.
    first_sending_at: datetime | None

    @property
    def key(self) -> str:
        return str(UUID(bytes=self.pk))


def new_key() -> UUID:
    """A random UUID of version 7 (RFC 9562): its first 48 bits are the time in milliseconds."""
    milliseconds = time.time_ns() // 1_000_000
    value = int.from_bytes(milliseconds.to_bytes(6, "big") + os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0x3 << 62) | 0x2 << 62)


def lane_of(target: str, key: str | bytes) -> bytes:
    """What keeps the messages of a key to one broker in order."""
    data = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    digest = blake2b(digest_size=16, person=b"idemq outgoing")
    digest.update(blake2b(target.encode(), digest_size=16).digest())
    digest.update(data)
    return digest.digest()


def plan(
    connection: Connection,
    kind: int,
    target: str,
    message: Message,
    *,
    address: Sequence[str] = (),
    lane: bytes | None = None,
    schema_name: str | None = None,
) -> UUID:
    """Write a row in the caller's transaction. Raises `ValueError` for what is too large to be kept."""
    table, pk = schema.table("idemq_outgoing", schema_name), new_key()
    if message.id is None:
        properties = {**properties_of(message), "message_id": str(pk)}
    else:
        properties = properties_of(message)
    parts = {"headers": packed(message.headers), "properties": packed(properties)}
    large = [*parts.values(), message.body or b""]
    size = sum(map(len, large))
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes are too many: at most {MAX_BYTES} can be sent")
    if (packet := too_small_packet(connection, large)) is not None:
        raise ValueError(f"{size} bytes are too many for the database: max_allowed_packet={packet}")
    times = dict.fromkeys(("not_before", "at", "last_at"), text(NOW[kind_of(connection.dialect)]))
    row = {"pk": pk.bytes, "kind": kind, "state": WAITING, "target": target.encode(), "lane": lane}
    row |= {"destination": packed({"address": address}), "body": message.body, **parts, **times}
    statement: Any = insert(table).values(row)
    if connection.dialect.name == "postgresql" and not relays:
        statement = statement.returning(func.pg_notify(CHANNEL, ""))
    with names.naming_missing_tables():
        connection.execute(statement)
    return pk


class Outgoing:
    """The rows of one broker or effect, for a process that sends them. Begins and commits transactions."""

    def __init__(self, kinds: Sequence[int], target: str, owner: bytes, schema_name: str | None) -> None:
        self.table = schema.table("idemq_outgoing", schema_name)
        self._owner = owner
        self._kinds, self._target = kinds, target.encode()
        self._ours = self.table.c.kind.in_(kinds) & (self.table.c.target == self._target)

    def due(self, now: datetime, *states: int) -> ColumnElement[bool]:
        table = self.table
        return self._ours & table.c.state.in_(states) & (table.c.not_before <= now)

    def take(self, connection: Connection, seqs: Sequence[int], now: datetime, **changes: Any) -> list[Row]:
        """Make rows ours for `LEASE` seconds; as they are then."""
        if not seqs:
            return []
        table, until = self.table, now + timedelta(seconds=LEASE)
        lease = {"owner": self._owner, "lease_until": until, "not_before": until, "last_at": now}
        chosen = table.c.seq.in_(seqs)
        connection.execute(update(table).where(chosen).values(**lease, **changes))
        found = connection.execute(select(table).where(chosen).order_by(table.c.seq)).mappings()
        return [row_of(row) for row in found]

    def renew(self, connection: Connection, seqs: Sequence[int]) -> None:
        """A new lease for those that are still ours."""
        table = self.table
        with begin(connection):
            until = clock(connection) + timedelta(seconds=LEASE)
            mine = self.unlocked(connection, table.c.seq.in_(seqs) & (table.c.owner == self._owner))
            connection.execute(update(table).where(mine).values(lease_until=until, not_before=until))

    def unlocked(self, connection: Connection, which: ColumnElement[bool]) -> ColumnElement[bool]:
        """Those that no other transaction works on, locked.

        A pump never waits for a transaction of somebody else, who may take his time: on MySQL and MariaDB an
        UPDATE by state would wait even for what is planned for another broker.
        """
        table = self.table
        free = connection.scalars(select(table.c.seq).where(which).with_for_update(skip_locked=True)).all()
        return which & table.c.seq.in_(free)

    def mine(self, row: Row, *states: int) -> ColumnElement[bool]:
        """It is still the attempt that we began, or, without states, the one that nobody has ended."""
        table = self.table
        same = (table.c.seq == row.seq) & (table.c.attempts == row.attempts)
        return same & table.c.state.in_(states) if states else same & (table.c.owner == self._owner)

    def change(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        state: int,
        *,
        due: float | None,
        now: datetime,
        **more: Any,
    ) -> bool:
        """Whether it was changed; it has no owner then, and is due in so many seconds, or never (None)."""
        not_before = None if due is None else now + timedelta(seconds=due)
        free = {"owner": None, "lease_until": None, "last_at": now, "not_before": not_before}
        updated = update(self.table).where(which).values(state=state, **free, **more)
        return connection.execute(updated).rowcount > 0  # of an UPDATE

    def delete(self, connection: Connection, which: ColumnElement[bool]) -> bool:
        return connection.execute(delete(self.table).where(which)).rowcount > 0


class Messages(Outgoing):
    """The messages to one broker."""

    def __init__(self, broker: str, owner: bytes, schema_name: str | None) -> None:
        super().__init__((MESSAGE, REPLY), broker, owner, schema_name)

    def pick(self, connection: Connection, count: int) -> list[Row]:
        """Up to `count` messages that are due, and `MAX_BYTES`: of each lane those that nothing comes before.

        What is read without a lock says which may be picked; the locks, taken by number, say which are: a
        scan that locks would hold up whoever plans.
        """
        transaction = begin(connection)
        now = clock(connection)
        ready = self._ready(connection, count, now)
        wanted = [seq for seqs in ready for seq in seqs]
        free = self._free(connection, wanted, now) if wanted else set()
        seqs = [seq for lane in ready for seq in takewhile(free.__contains__, lane)]
        rows = self.take(connection, seqs, now, state=SENDING, attempts=self.table.c.attempts + 1)
        transaction.commit()
        return rows

    def _free(self, connection: Connection, seqs: Sequence[int], now: datetime) -> set[int]:
        """Those still due that nobody else picks at this moment, locked."""
        which = self.table.c.seq.in_(seqs) & self.due(now, WAITING)
        query = select(self.table.c.seq).where(which).with_for_update(skip_locked=True)
        return set(connection.scalars(query))

    def _ready(self, connection: Connection, count: int, now: datetime) -> list[list[int]]:
        """Lane by lane, in their order; a message without a lane is one of its own."""
        table = self.table
        # Picked, or to be tried again later: its lane waits. Not correlated, so it is looked for once.
        other = table.alias().c
        later = (other.state == SENDING) | (other.state == WAITING) & (other.not_before > now)
        ours = (other.kind.in_(self._kinds)) & (other.target == self._target)
        held = select(other.lane).where(ours, later, other.lane.is_not(None))
        found = connection.execute(
            select(table.c.seq, table.c.lane, _size(table))
            .where(self.due(now, WAITING), table.c.lane.is_(None) | table.c.lane.not_in(held))
            .order_by(table.c.not_before, table.c.seq)
            .limit(count)
        ).all()
        loose, lanes = [row for row in found if row.lane is None], {row.lane for row in found} - {None}
        first: list[Any] = []
        if lanes:  # those found may be behind others that came due after them
            last = max(row.seq for row in found if row.lane is not None)
            columns = table.c.seq, table.c.lane, table.c.state, table.c.not_before, _size(table)
            before = select(*columns).where(table.c.lane.in_(lanes), table.c.seq <= last)
            first = list(connection.execute(before.order_by(table.c.seq).limit(count)))
        ready: dict[object, list[int]] = {}
        held_up: set[bytes] = set()
        size = 0
        for row in sorted([*loose, *first], key=lambda row: row.seq)[:count]:
            if row.lane is not None and (row.state != WAITING or row.not_before > now):
                held_up.add(row.lane)
            if row.lane in held_up:
                continue
            size += row.size
            if size > MAX_BYTES and ready:
                break
            ready.setdefault(row.lane or row.seq, []).append(row.seq)
        return list(ready.values())

    def sent(self, connection: Connection, rows: Sequence[Row]) -> None:
        """The broker has confirmed them: whoever has them now, they need not be sent."""
        with begin(connection):
            self.delete(connection, self.table.c.seq.in_([row.seq for row in rows]))

    def unsent(self, connection: Connection, rows: Sequence[tuple[Row, str | None, float]]) -> None:
        """Those not confirmed: why, where the broker said so, and in how many seconds they are due."""
        with begin(connection):
            now = clock(connection)
            for row, why, due in rows:
                self.change(connection, self.mine(row), WAITING, due=due, now=now, error=why)

    def reap(self, connection: Connection) -> None:
        """What a process had that died, or froze for longer than its lease, is due again."""
        with begin(connection):
            now = clock(connection)
            ended = self.unlocked(connection, self.due(now, SENDING))
            self.change(connection, ended, WAITING, due=0.0, now=now)


def _size(table: Table) -> ColumnElement[int]:
    parts = (table.c.body, table.c.headers, table.c.properties)
    return sum((func.coalesce(func.length(each), 0) for each in parts), literal(0)).label("size")


def row_of(row: Any) -> Row:
    return Row(
        pk=row["pk"],
        seq=row["seq"],
        kind=row["kind"],
        address=tuple(as_text(each) or "" for each in unpacked(row["destination"]).get("address", ())),
        lane=row["lane"],
        message=message_of({**row, "sent_at": row["at"], "origin": None}),
        attempts=row["attempts"],
        state=row["state"],
        first_sending_at=row["first_sending_at"],
    )
