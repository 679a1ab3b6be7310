"""The work that both sides do for a message, and the stop-watch that stands in the middle of it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import msgspec
from sqlalchemy import Column, Integer, Table, Uuid
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Posting(Base):
    """What a handler writes."""

    __tablename__ = "postings"
    id: Mapped[int] = mapped_column(primary_key=True)
    payment: Mapped[int]
    amount: Mapped[int]
    payer: Mapped[str]


#: The claims of the hand-written loops: what a careful user would make, and nothing more.
INBOX = Table(
    "inbox",
    Base.metadata,
    Column("consumer", Integer, primary_key=True, autoincrement=False),
    Column("id", Uuid(as_uuid=False), primary_key=True),
)
#: One row, or none when the message was processed before.
CLAIM = insert(INBOX).on_conflict_do_nothing().returning(INBOX.c.id)


@dataclass(frozen=True, slots=True)
class Payment:
    id: int
    amount: int
    payer: str


def body(number: int) -> bytes:
    return msgspec.json.encode(Payment(number, number % 1000, f"payer-{number}"))


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds for a message."""

    wall: float
    #: Of all of this process's threads.
    cpu: float


class Meter:
    """Counts the handler's calls and times those after the warm-up of a round.

    From one call to a later one lie as many whole messages as calls: claim, work, commit, acknowledgement
    and the fetch of the next.
    """

    def __init__(self) -> None:
        self._count = self._first = self._last = 0
        self._began = self._ended = (0.0, 0.0)
        self._full = threading.Event()

    def arm(self, warm_up: int, messages: int) -> None:
        self._count, self._first, self._last = 0, warm_up, warm_up + messages
        self._full.clear()

    def hit(self) -> None:
        self._count += 1
        if self._count == self._first:
            self._began = (time.perf_counter(), time.process_time())
        elif self._count == self._last:
            self._ended = (time.perf_counter(), time.process_time())
            self._full.set()

    def pace(self) -> Pace:
        """Waits for the end of the round."""
        if not self._full.wait(120):
            raise RuntimeError(f"{self._count} of {self._last} messages within two minutes")
        messages = self._last - self._first
        wall, cpu = (
            (ended - began) / messages for began, ended in zip(self._began, self._ended, strict=True)
        )
        return Pace(wall, cpu)


class Work:
    """The handlers, the same for both sides."""

    def __init__(self) -> None:
        self.meter = Meter()
        #: Tells a hand-written loop to end.
        self.stopped = False

    def handle(self, payment: Payment, session: Session) -> None:
        session.add(Posting(payment=payment.id, amount=payment.amount, payer=payment.payer))
        self.meter.hit()

    async def handle_async(self, payment: Payment, session: AsyncSession) -> None:
        session.add(Posting(payment=payment.id, amount=payment.amount, payer=payment.payer))
        self.meter.hit()
