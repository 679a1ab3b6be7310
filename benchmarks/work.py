"""The work that both sides do for a message, and the stop-watch that stands in the middle of it."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    """Counts the handler's calls and times those after the warm-up.

    From one call to a later one lie as many whole messages as calls: claim, work, commit, acknowledgement
    and the fetch of the next, with the connecting and the first statements of either side left out.
    """

    def __init__(self, warm_up: int, messages: int, full: Callable[[], None]) -> None:
        self._warm_up, self._messages, self._full = warm_up, messages, full
        self._count = 0
        self._began = self._ended = (0.0, 0.0)

    def hit(self) -> None:
        self._count += 1
        if self._count == self._warm_up:
            self._began = (time.perf_counter(), time.process_time())
        elif self._count == self._warm_up + self._messages:
            self._ended = (time.perf_counter(), time.process_time())
            self._full()

    @property
    def full(self) -> bool:
        return self._count >= self._warm_up + self._messages

    @property
    def pace(self) -> Pace:
        wall, cpu = (
            (ended - began) / self._messages for began, ended in zip(self._began, self._ended, strict=True)
        )
        return Pace(wall, cpu)


class Work:
    """The handlers, the same for both sides. `meter` is set anew for every round."""

    def __init__(self) -> None:
        self.meter = Meter(0, 0, lambda: None)

    def handle(self, payment: Payment, session: Session) -> None:
        session.add(Posting(payment=payment.id, amount=payment.amount, payer=payment.payer))
        self.meter.hit()

    async def handle_async(self, payment: Payment, session: AsyncSession) -> None:
        session.add(Posting(payment=payment.id, amount=payment.amount, payer=payment.payer))
        self.meter.hit()
