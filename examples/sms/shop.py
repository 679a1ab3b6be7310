"""A payment settles; the shop writes a receipt, and the customer gets one text.

Run it with `idemq run shop:app`. Where the messages come from and where the receipts go is chosen by
environment variables; see README.md. `python shop.py` makes the shop's own table.
"""

import json
import os
from dataclasses import dataclass
from urllib.request import Request, urlopen

from brokers import broker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import App, Effects

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


@dataclass
class Text:
    payment: str
    phone: str


# The gateway does nothing twice under one key, for a day: what is in doubt may be asked for again.
@app.effect("text", repeat="provider-key", key_lifetime=24 * 3600)
def send_text(text: Text, key: str) -> None:
    request = Request(GATEWAY, json.dumps(vars(text)).encode(), {"Idempotency-Key": key}, method="POST")
    with urlopen(request, timeout=2):
        pass


@app.consumer("receipts", broker().source())
def receipt(event: PaymentSettled, session: Session, effects: Effects) -> None:
    session.add(Receipt(payment=event.payment))
    effects.plan(send_text, Text(event.payment, event.phone))


if __name__ == "__main__":
    assert app.engine is not None
    Base.metadata.create_all(app.engine)
