"""A payment settles; the shop writes a receipt and the customer gets one text.

Run it with `idemq run shop:app`. Where the messages come from and where the receipts go is chosen by
environment variables; see README.md. `python shop.py` makes the shop's own table.
"""

import os
from dataclasses import dataclass
from urllib.request import Request, urlopen

from brokers import broker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import App

GATEWAY = os.environ.get("GATEWAY", "http://127.0.0.1:8025")

app = App(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))


class Base(DeclarativeBase):
    pass


class Receipt(Base):
    __tablename__ = "receipts"
    number: Mapped[int] = mapped_column(primary_key=True)
    payment: Mapped[str]  # not unique on purpose: a second receipt for a payment would be seen


@dataclass
class PaymentSettled:
    payment: str
    phone: str


@app.consumer("receipts", broker().source())
def receipt(event: PaymentSettled, session: Session) -> None:
    session.add(Receipt(payment=event.payment))
    session.flush()
    headers = {"Idempotency-Key": event.payment}
    with urlopen(Request(GATEWAY, event.phone.encode(), headers, method="POST"), timeout=10):
        pass
    # The window: the text has left, and the receipt is not committed yet.


if __name__ == "__main__":
    assert app.engine is not None
    Base.metadata.create_all(app.engine)
