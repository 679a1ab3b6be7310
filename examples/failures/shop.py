"""Twenty payments settle, and four more go wrong, each in a way of its own.

`idemq run shop:app` works on them. `python shop.py` makes the tables of the shop and publishes, and
`python shop.py take CHF` mends one of the four. README.md tells what to look at meanwhile.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import App, Message, Reject
from idemq.embedded import Embedded

broker = Embedded("broker.db")
app = App("sqlite:///shop.db")


class Base(DeclarativeBase):
    pass


class Currency(Base):
    """What the shop takes."""

    __tablename__ = "currencies"
    code: Mapped[str] = mapped_column(primary_key=True)


class Receipt(Base):
    __tablename__ = "receipts"
    number: Mapped[int] = mapped_column(primary_key=True)
    payment: Mapped[str]  # not unique on purpose: a second receipt for a payment would be seen


@dataclass
class PaymentSettled:
    payment: str
    currency: str = "EUR"


@app.consumer(
    "receipts",
    broker.queue("payments", declare=True),
    retry=Retrying(stop=stop_after_attempt(5), wait=wait_fixed(3)),
)
def receipt(event: PaymentSettled, session: Session) -> None:
    session.add(Receipt(payment=event.payment))
    session.flush()
    if event.payment == "pay-bank":
        ask_the_bank()
    if session.get(Currency, event.currency) is None:
        raise Reject(f"the shop takes no {event.currency}")
    if event.payment == "pay-poison":
        os._exit(7)  # as a segmentation fault does, or the kernel when memory runs out


def ask_the_bank() -> None:
    """Somebody else's service, which is away the first two times."""
    log = Path("bank.log")  # no table: what the handler wrote is rolled back
    with log.open("a") as file:
        file.write("asked\n")
    if len(log.read_text().split()) <= 2:
        raise ConnectionError("the bank does not answer")


def settled(payment: str, **more: str) -> bytes:
    return json.dumps({"payment": payment, **more}).encode()


def take(currency: str) -> None:
    with Session(app.engine) as session:
        session.add(Currency(code=currency))
        session.commit()


def main() -> None:
    assert app.engine is not None
    Base.metadata.create_all(app.engine)
    take("EUR")
    payments = {f"pay-{number:02}": settled(f"pay-{number:02}") for number in range(20)}
    payments["pay-bank"] = settled("pay-bank")
    payments["pay-francs"] = settled("pay-francs", currency="CHF")
    payments["pay-poison"] = settled("pay-poison")
    broker.declare("payments")
    broker.publish_many("payments", [Message(id=id, body=body) for id, body in payments.items()])
    broker.publish("payments", settled("pay-nameless"))  # without an id


if __name__ == "__main__":
    if sys.argv[1:2] == ["take"]:
        take(sys.argv[2])
    else:
        main()
