"""Known-wrong variants of the core. Each must turn the checker red, or the proof proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sqlalchemy import Connection

from idemq import consuming, drivers, ordering, parking, process
from idemq.broker import Delivery
from idemq.effect_rows import EffectRows
from idemq.failures import Job
from idemq.ledger import clock
from idemq.message import Verdict
from idemq.outgoing import SENDING, WAITING, Row
from idemq.pumps import MessagePump


class _Acked:
    """A delivery that was acknowledged before its time."""

    def __init__(self, delivery: Delivery) -> None:
        self.message = delivery.message
        self.start = delivery.start
        self.rest = delivery.rest
        self.drop = delivery.drop

    def ack(self) -> None:
        """Done long ago."""


def ack_before_commit() -> None:
    """Acknowledge what was delivered as soon as it is here."""
    deliver = consuming.ConsumerWorker._deliver

    def early(self: consuming.ConsumerWorker, deliveries: Sequence[Delivery]) -> None:
        wrapped = [_Acked(delivery) for delivery in deliveries]
        for delivery in deliveries:
            delivery.start()
            delivery.ack()
        deliver(self, wrapped)

    consuming.ConsumerWorker._deliver = early  # type: ignore[method-assign]  # breaking it is the purpose


def claim_in_its_own_transaction() -> None:
    """Commit the claim first, then run the handler in another transaction."""
    begin = process.Unit.begin

    def apart(self: process.Unit, job: Job) -> Verdict | None:
        verdict = begin(self, job)
        if verdict is None:
            self._guard.take_back()
            claim = self._guard._claim
            assert self._transaction is not None
            assert claim is not None
            self._transaction.commit()
            job.tokens.clear()
            self._transaction = drivers.begin(self.connection)
            self._guard.lend(self._transaction, claim)
        return verdict

    process.Unit.begin = apart  # type: ignore[method-assign]  # breaking it is the purpose


CONTROLS: dict[str, Callable[[], None]] = {
    "ack before commit": ack_before_commit,
    "claim in its own transaction": claim_in_its_own_transaction,
}


def key_order_forgotten() -> None:
    """Start what is delivered at once, and look for nothing that is parked before it."""
    parking.Parking.behind = lambda self, connection, job: 0  # type: ignore[method-assign]  # on purpose
    ordering.Keys._admitted = lambda self, item: True  # type: ignore[method-assign]  # on purpose


#: Those that keep messages and lose their order.
ORDER_CONTROLS: dict[str, Callable[[], None]] = {"key order forgotten": key_order_forgotten}


def the_dead_sent_nothing() -> None:
    """Send anew what a process was sending when it died."""

    def reap(self: EffectRows, connection: Connection) -> None:
        with drivers.begin(connection):
            now = clock(connection)
            unsent = self.due(now, SENDING)
            self.change(connection, unsent, WAITING, due=0.0, now=now, first_sending_at=None)

    EffectRows.reap = reap  # type: ignore[method-assign]  # on purpose


def an_error_means_not_sent() -> None:
    """Send anew whatever did not end well."""
    EffectRows.in_doubt = EffectRows.not_sent  # type: ignore[method-assign]  # on purpose


#: Those that send a text twice.
EFFECT_CONTROLS: dict[str, Callable[[], None]] = {
    "the dead sent nothing": the_dead_sent_nothing,
    "an error means not sent": an_error_means_not_sent,
}


def deleted_before_confirmed() -> None:
    """Take a message from the outbox before the broker has it."""
    publish = MessagePump._publish

    def early(self: MessagePump, batch: list[Row]) -> list[Row]:
        self.database.run(lambda connection: self._messages.sent(connection, batch))
        return publish(self, batch)

    MessagePump._publish = early  # type: ignore[method-assign]  # on purpose


#: Those that lose what was planned.
OUTBOX_CONTROLS: dict[str, Callable[[], None]] = {"deleted before confirmed": deleted_before_confirmed}


def apply(name: str) -> None:
    """Break the core in this process; nothing for the empty name."""
    if name:
        (CONTROLS | ORDER_CONTROLS | EFFECT_CONTROLS | OUTBOX_CONTROLS)[name]()
