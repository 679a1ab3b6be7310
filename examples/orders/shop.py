"""A shop that makes orders, takes them from the stock, and keeps their states: `idemq run shop:app`.

`python shop.py` makes its tables and queues, and `python shop.py send QUEUE ID BODY ...` sends it messages.
Broker and database are RABBITMQ_URL and DATABASE_URL, else files.
"""

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import App, Message, Outbox, guards
from idemq.embedded import Embedded

NAME = os.environ.get("ORDERS", "orders")

if url := os.environ.get("RABBITMQ_URL"):
    from idemq.rabbitmq import RabbitMQ

    broker: Embedded | RabbitMQ = RabbitMQ(url)
else:
    broker = Embedded("broker.db")

app = App(os.environ.get("DATABASE_URL", "sqlite:///shop.db"), brokers=[broker])


class Base(DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    name: Mapped[str] = mapped_column(primary_key=True)
    stock: Mapped[int]


class Order(Base):
    __tablename__ = "orders"
    __table_args__ = (UniqueConstraint("number", name="orders_number"),)
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str]
    state: Mapped[str]


class Entry(Base):
    """What a handler was asked, and what became of it."""

    __tablename__ = "journal"
    row: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[str]
    asked: Mapped[str]
    became: Mapped[str]


@dataclass
class Placed:
    order: str
    item: str
    quantity: int


@dataclass
class Changed:
    order: str
    state: Literal["created", "paid"]


@app.consumer("orders", broker.queue(f"{NAME}.create", declare=True))
def create(placed: Placed, session: Session, outbox: Outbox) -> None:
    order = Order(number=placed.order, state="new")
    with guards.already_done(session, "orders_number") as attempt:
        session.add(order)
    if attempt.done_before:  # under another message id
        session.add(Entry(number=placed.order, asked="create", became="done before"))
        return
    taken = guards.decrement(session, Item, {"name": placed.item}, "stock", by=placed.quantity)
    if taken.outcome is guards.Outcome.APPLIED:
        outbox.publish(broker.to(f"{NAME}.status"), Changed(placed.order, "created"), key=placed.order)
    else:
        order.state = "declined"
    session.add(Entry(number=placed.order, asked="create", became=taken.outcome.value))


#: From where an order gets into a state. Paid from new too: `created` may be late.
EARLIER = {"created": ["new"], "paid": ["new", "created"]}


@app.consumer("statuses", broker.queue(f"{NAME}.status", declare=True))
def status(changed: Changed, session: Session) -> None:
    key, to = {"number": changed.order}, changed.state
    moved = guards.transition(session, Order, key, "state", to=to, allowed_from=EARLIER[to])
    if moved.outcome is guards.Outcome.MISSING:
        raise LookupError(f"there is no order {changed.order} yet")  # tried again, later
    session.add(Entry(number=changed.order, asked=to, became=moved.outcome.value))


def send(queue: str, *messages: str) -> None:
    address = broker.to(f"{NAME}.{queue}").address
    pairs = zip(messages[::2], messages[1::2], strict=True)
    batch = [(address, Message(id=id, body=body.encode())) for id, body in pairs]
    with closing(broker.publisher()) as publisher:
        if any(refused := publisher.publish(batch, timeout=30)):
            sys.exit(f"not published: {refused}")


def make() -> None:
    assert app.engine is not None
    Base.metadata.create_all(app.engine)
    with Session(app.engine) as session, session.begin():
        session.merge(Item(name="pears", stock=10))
    for declared in app.consumers.values():
        declared.source.check()  # makes the queue


if __name__ == "__main__":
    send(*sys.argv[2:]) if sys.argv[1:] else make()
