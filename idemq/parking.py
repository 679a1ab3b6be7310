"""Takes up messages that were parked: due rows of `idemq_failed` become jobs again.

A row that is picked carries its owner and a lease, and is due again when the lease ends: then its owner died
or froze with it. Such a row is a *suspect*, because it may be what killed the owner; so is a message that a
broker delivers again without saying why. Suspects are picked one at a time by a process that does nothing
else meanwhile (`alone`), and only what ends such a process counts as a crash.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from time import monotonic
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, RowMapping, func, select, update

from idemq import schema
from idemq.drivers import begin
from idemq.errors import BadMessage, Crashed
from idemq.failures import DEAD, WAITING, Job, Judge, Outcome, Row
from idemq.ledger import Ledger, clock
from idemq.message import key_of
from idemq.packing import message_of, unpacked

#: How long a picked row may wait for its turn, in seconds. While it runs its own lock keeps others away.
#: What ends before that is told of by who started the process.
LEASE = 60.0

#: How many messages of a key may be parked behind another; what comes then waits with the broker.
MOST_BEHIND = 1000

#: How often the database is asked for parked messages that are due, in seconds.
LOOK_EVERY = 1.0

#: How long a message that is tried again, or whose twin is in flight, is kept until it is parked, in seconds.
KEEP = 10.0

#: How many due rows are looked at in one transaction.
LOOK = 50


class Found(NamedTuple):
    """What a look for parked messages found."""

    jobs: list[Job]
    #: There are suspects for a process that runs them alone.
    suspects: bool


class Parking:
    """The parked messages of one consumer."""

    def __init__(
        self,
        ledger: Ledger,
        consumer: int,
        judge: Judge,
        max_crashes: int,
        *,
        ordered: bool = False,
        hold_dead: bool = False,
    ) -> None:
        self._ledger, self._consumer = ledger, consumer
        self._judge, self._max_crashes = judge, max_crashes
        self._table = schema.table("idemq_failed", ledger.schema)
        self._ordered = ordered
        #: States that hold what comes after them of the same key.
        self._holding = (WAITING, DEAD) if hold_dead else (WAITING,)

    def look(
        self,
        connection: Connection,
        owner: bytes,
        count: int,
        *,
        alone: bool = False,
        inline: bool = False,
        reap: bool = True,
        ended: bytes | None = None,
    ) -> Found:
        """Pick due messages: up to `count` ordinary ones; or one suspect, to run `alone`; or both (`inline`).

        The leases of the owner that is known to have `ended` end now. Begins and commits its own
        transactions. Raises database errors.
        """
        if ended is not None:
            self._change(connection, ended, {}, 0.0)
        with connection.begin():
            ordinary, suspects = self.due(connection)
        ordinary, suspect = ordinary and not alone, suspects and (alone or inline)
        jobs: list[Job] = []
        if ordinary or suspect:
            transaction = begin(connection)
            if suspect:
                jobs += self.pick(connection, owner, 1, alone=True, reap=False)
            if ordinary:
                jobs += self.pick(connection, owner, count, alone=False, reap=reap)
            transaction.commit()
        return Found(jobs, suspects)

    def due(self, connection: Connection) -> tuple[bool, bool]:
        """Whether ordinary rows are due (or leases have ended), and whether suspects are. Takes no lock."""
        table, condition = self._table, self._due(clock(connection))
        suspects = (table.c.starts > 0) & table.c.owner.is_(None)
        found = [
            connection.execute(select(table.c.seq).where(condition, kind).limit(1)).first() is not None
            for kind in (~suspects, suspects)
        ]
        return found[0], found[1]

    def pick(self, connection: Connection, owner: bytes, count: int, *, alone: bool, reap: bool) -> list[Job]:
        """Up to `count` due messages, ours from the caller's commit on: ordinary ones, or suspects (`alone`).

        With `reap`, rows whose lease has ended become suspects; those that ended a process too often are
        picked here as well, to be buried.
        """
        now, table = clock(connection), self._table
        ended = table.c.owner.is_not(None)
        wanted = table.c.owner.is_(None) & ((table.c.starts > 0) if alone else (table.c.starts == 0))
        columns = (table.c.seq, table.c.owner, table.c.alone, table.c.crashes)
        rows = connection.execute(
            select(*columns)
            .where(self._due(now), (wanted | ended) if reap else wanted)
            .order_by(table.c.not_before, table.c.seq)
            .limit(LOOK)
            .with_for_update(skip_locked=True)
        ).all()
        picked = [row.seq for row in rows if row.owner is None][:count]
        crashed: list[int] = []
        for row in rows:
            if row.owner is not None:
                self._ended(connection, row.seq, crashed=bool(row.alone), now=now)
                if row.crashes + row.alone >= self._max_crashes:  # also when who was to bury it died
                    crashed.append(row.seq)
        taken = picked + crashed
        if not taken:
            return []
        until = now + timedelta(seconds=LEASE)
        lease = {"owner": owner, "alone": alone, "lease_until": until, "not_before": until}
        connection.execute(update(table).where(table.c.seq.in_(taken)).values(lease))
        found = connection.execute(
            select(table).where(table.c.seq.in_(taken)).order_by(table.c.seq)
        ).mappings()
        return [self._job(row, now, crashed=row["seq"] in crashed) for row in found]

    def lease(self, connection: Connection, owner: bytes, *, alone: bool | None) -> None:
        """A new lease for what `owner` has picked and does not run now; its end is a crash if it is `alone`.

        None: it is given back, and due at once.
        """
        if alone is None:
            self._change(connection, owner, {"owner": None, "alone": False, "lease_until": None}, 0.0)
        else:
            self._change(connection, owner, {"alone": alone}, LEASE)

    def _change(self, connection: Connection, owner: bytes, values: dict[str, Any], due: float) -> None:
        table, transaction = self._table, begin(connection)
        # One after the other, because an UPDATE by owner would wait for, and lock, what others have.
        picked = (table.c.consumer == self._consumer) & (table.c.state == WAITING) & (table.c.owner == owner)
        found = connection.execute(select(table.c.seq).where(picked).with_for_update(skip_locked=True))
        then = clock(connection) + timedelta(seconds=due)
        for seq in found.scalars().all():
            connection.execute(update(table).where(table.c.seq == seq).values(not_before=then, **values))
        transaction.commit()

    def behind(self, connection: Connection, job: Job) -> int:
        """How many messages of its key are parked and hold this one, up to `MOST_BEHIND`."""
        table = self._table
        if not self._ordered or job.lane is None:
            return 0
        held = (table.c.consumer == self._consumer) & (table.c.lane == job.lane)
        held &= table.c.state.in_(self._holding)
        if job.row is not None:
            held &= table.c.seq < job.row.seq
        if connection.execute(select(table.c.seq).where(held).limit(1)).first() is None:
            return 0
        some = select(table.c.seq).where(held).limit(MOST_BEHIND).subquery()
        return connection.scalar(select(func.count()).select_from(some)) or 0

    def _due(self, now: datetime) -> ColumnElement[bool]:
        table = self._table
        due = (table.c.consumer == self._consumer) & (table.c.state == WAITING) & (table.c.not_before <= now)
        if not self._ordered:
            return due
        before = table.alias()
        first = ~(
            select(before.c.seq)
            .where(
                before.c.consumer == table.c.consumer,
                before.c.lane == table.c.lane,
                before.c.state.in_(self._holding),
                before.c.seq < table.c.seq,
            )
            .exists()
        )
        return due & first

    def _ended(self, connection: Connection, seq: int, *, crashed: bool, now: datetime) -> None:
        table = self._table
        changes = {
            "starts": table.c.starts + 1,
            "crashes": table.c.crashes + int(crashed),
            "owner": None,
            "alone": False,
            "lease_until": None,
            "not_before": now,
            "last_at": now,
        }
        connection.execute(update(table).where(table.c.seq == seq).values(changes))

    def _job(self, row: RowMapping, now: datetime, *, crashed: bool) -> Job:
        message = message_of(row)
        if row["owns_claim"]:
            job = Job(message, row["identity"], row["fingerprint"])
        elif message.id is not None and unpacked(row["properties"]).get("judged"):
            job = Job(message, key_of(message.id), row["fingerprint"])
        else:  # it had no usable id when it was buried; the consumer's rule may have been mended
            job = self._judge(message)
        if message.unreadable is not None:  # what is kept may be incomplete, however often it is retried
            job.bad = BadMessage(message.unreadable)
        job.lane = row["lane"]
        job.row = Row(row["pk"], row["owner"], row["owns_claim"], row["seq"])
        job.failures = row["attempts"]
        job.began = monotonic() - max(0.0, (now - row["first_at"]).total_seconds())
        if crashed:
            error = Crashed(f"it ended {row['crashes']} processes in which it ran alone")
            job.outcome = Outcome(Crashed.reason, error)
        return job
