"""The demo's application: a payment settles, and the customer gets one text.

It is run as `idemq run shop:app --processes 4`. Nothing in it knows of repeats, kills or transactions.
"""

from dataclasses import dataclass
from urllib.request import Request, urlopen

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import App
from idemq.embedded import Embedded

GATEWAY = "http://127.0.0.1:{port}/texts"

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


@app.consumer("receipts", broker.queue("payments.settled"))
def receipt(event: PaymentSettled, session: Session) -> None:
    session.add(Receipt(payment=event.payment))
    session.flush()
    # The gateway is outside the transaction. Should this process die between its answer and the commit,
    # the redelivery asks again with the same key, and the gateway answers without a second text.
    request = Request(GATEWAY, event.phone.encode(), {"Idempotency-Key": event.payment}, method="POST")
    with urlopen(request, timeout=10):
        pass
