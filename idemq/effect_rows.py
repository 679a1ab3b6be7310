"""The states of an effect, and every step between them: each is one compare-and-set.

    waiting -> sending -> (gone: done) | waiting (not sent) | failed (refused) | in doubt
    in doubt -> sending (the provider knows the key) | waiting (a look-up says absent) | (gone) | a person

`sending` is committed before the call. What is then known of attempt n is true whoever owns the row by now,
so it is written down unless attempt n + 1 has begun or a person has decided; what is not known, only by the
owner. Moments are the database's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import Connection, func, select

from idemq import outgoing
from idemq.drivers import begin
from idemq.ledger import clock
from idemq.outgoing import EFFECT, FAILED, IN_DOUBT, SENDING, WAITING, Outgoing, Row
from idemq.packing import error_text

#: What a process that has picked an effect is to do with it.
Step = Literal["send", "look up"]
SEND: Step = "send"
LOOK: Step = "look up"

#: Between attempts that the provider's key protects when the policy asks for none, in seconds.
REST = 30.0

DIED = "the process that sent it died, or froze for longer than its lease"


@dataclass(frozen=True, slots=True)
class Repeats:
    """What resolves the doubt about an effect without a person; in seconds."""

    #: The provider does nothing twice under one key, for so long after the first attempt.
    key_lifetime: float | None = None
    #: There is a look-up; its answer is believed so long after the last call ended.
    settle: float | None = None

    @property
    def due(self) -> float | None:
        """When an effect in doubt is looked at again; None: a person decides."""
        return 0.0 if self.key_lifetime is not None else self.settle


class EffectRows(Outgoing):
    """The rows of one declared effect."""

    def __init__(self, name: str, owner: bytes, schema_name: str | None, repeats: Repeats) -> None:
        super().__init__((EFFECT,), name, owner, schema_name)
        self._repeats = repeats

    def pick(self, connection: Connection, count: int) -> list[tuple[Row, Step]]:
        """Up to `count` effects that are due, and what is to be done; an attempt is committed as begun.

        Their `first_sending_at` tells of attempts before this one.
        """
        table, transaction = self.table, begin(connection)
        now = clock(connection)
        found = connection.execute(
            select(table.c.seq, table.c.state, table.c.first_sending_at)
            .where(self.due(now, WAITING, IN_DOUBT))
            .order_by(table.c.not_before, table.c.seq)
            .limit(count)
            .with_for_update(skip_locked=True)
        ).all()
        steps = {row.seq: self._step(row.state, row.first_sending_at, now) for row in found}
        for seq in (seq for seq, step in steps.items() if step is None):
            self.change(connection, table.c.seq == seq, IN_DOUBT, due=None, now=now)
        before = {row.seq: row.first_sending_at for row in found}
        first = func.coalesce(table.c.first_sending_at, now)
        begun = {"state": SENDING, "attempts": table.c.attempts + 1, "first_sending_at": first}
        taken = self.take(connection, [seq for seq, step in steps.items() if step == SEND], now, **begun)
        taken += self.take(
            connection, [seq for seq, step in steps.items() if step == LOOK], now, state=IN_DOUBT
        )
        transaction.commit()
        return [(replace(row, first_sending_at=before[row.seq]), steps[row.seq] or LOOK) for row in taken]

    def _step(self, state: int, first_sending_at: datetime | None, now: datetime) -> Step | None:
        if first_sending_at is None:
            return SEND
        if self._repeats.key_lifetime is not None:
            # The lease is what the call may take to arrive.
            end = first_sending_at + timedelta(seconds=self._repeats.key_lifetime - outgoing.LEASE)
            return SEND if now < end else None
        return LOOK if state == IN_DOUBT and self._repeats.settle is not None else None

    def done(self, connection: Connection, row: Row) -> bool:
        """The effect is there. False: somebody else has found out, or decided, before."""
        with begin(connection):
            self._lock(connection, row)
            return self.delete(connection, self.mine(row, WAITING, SENDING, IN_DOUBT))

    def not_sent(
        self,
        connection: Connection,
        row: Row,
        error: BaseException,
        delay: float | None,
        *,
        hope: bool = True,
    ) -> bool:
        """This attempt sent nothing; another one in `delay` seconds, or none (None).

        Without `hope` a doubt about those before it is a person's.
        """
        unknown = row.first_sending_at is not None  # what an attempt before this one has sent
        state = WAITING if delay is not None else IN_DOUBT if unknown else FAILED
        more = {} if unknown else {"first_sending_at": None}
        if state == IN_DOUBT and hope and self._repeats.due is not None:  # resolved as any other
            delay = max(REST, self._repeats.due)
        return self._end(connection, row, (SENDING, IN_DOUBT), state, delay, error, **more)

    def refused(self, connection: Connection, row: Row, error: BaseException) -> bool:
        """The provider has said no, for good."""
        return self._end(connection, row, (SENDING, IN_DOUBT), FAILED, None, error)

    def in_doubt(self, connection: Connection, row: Row, error: BaseException, delay: float) -> bool:
        """Nobody knows what came of the call. Looked at again in `delay` seconds, where that can tell."""
        due = None if self._repeats.due is None else max(delay, self._repeats.due)
        return self._end(connection, row, (), IN_DOUBT, due, error)

    def absent(self, connection: Connection, row: Row) -> bool:
        """The look-up says that no call has got through: sent anew."""
        return self._end(connection, row, (), WAITING, 0.0, None, first_sending_at=None)

    def unknown(self, connection: Connection, row: Row, error: BaseException, delay: float) -> bool:
        """The look-up could not tell; once more in `delay` seconds."""
        return self._end(connection, row, (), IN_DOUBT, delay, error)

    def reap(self, connection: Connection) -> None:
        """What was being sent by a process that died, or froze for longer than its lease, is in doubt."""
        with begin(connection):
            now = clock(connection)
            ended = self.unlocked(connection, self.due(now, SENDING))
            self.change(connection, ended, IN_DOUBT, due=self._repeats.due, now=now, error=DIED)

    def _lock(self, connection: Connection, row: Row) -> None:
        """Raises a database error at once while a webhook's or a person's transaction has it: all pumps would
        wait with us, and no lease be renewed."""
        this = self.table.c.seq == row.seq
        connection.execute(select(self.table.c.seq).where(this).with_for_update(nowait=True))

    def _end(
        self,
        connection: Connection,
        row: Row,
        known: Sequence[int],
        state: int,
        due: float | None,
        error: BaseException | None,
        **more: None,
    ) -> bool:
        text = {} if error is None else {"error": error_text(error)}
        with begin(connection):
            self._lock(connection, row)
            which = self.mine(row, *known)
            return self.change(connection, which, state, due=due, now=clock(connection), **text, **more)
