"""The demo's application: a payment settles, and the customer gets one text.

It is run as `idemq run shop:app --processes 4`. Nothing in it knows of repeats, kills or transactions.
"""

import json
from dataclasses import asdict, dataclass
from urllib.request import Request, urlopen

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import App, Effects
from idemq.embedded import Embedded

GATEWAY = "http://127.0.0.1:{port}"

broker = Embedded("broker.db")
app = App("sqlite:///shop.db")


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


# This provider does nothing twice under one key, for a day.
@app.effect("text", repeat="provider-key", key_lifetime=24 * 3600)
def text(event: PaymentSettled, key: str) -> None:
    post("/texts", event, {"Idempotency-Key": key})


# This one knows no keys, and tells nobody what it has sent.
@app.effect("text-abroad")
def text_abroad(event: PaymentSettled, key: str) -> None:
    post("/abroad", event, {})


def post(path: str, event: PaymentSettled, headers: dict[str, str]) -> None:
    with urlopen(Request(GATEWAY + path, json.dumps(asdict(event)).encode(), headers), timeout=10):
        pass


@app.consumer("receipts", broker.queue("payments.settled"))
def receipt(event: PaymentSettled, session: Session, effects: Effects) -> None:
    session.add(Receipt(payment=event.payment))
    effects.plan(text if event.phone.startswith("+49") else text_abroad, event)
