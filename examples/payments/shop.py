"""A shop that takes money over HTTP: `uvicorn shop:app`, after `python shop.py` has made the tables.

The database is DATABASE_URL, else the file shop.db.
"""

import os
import time
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy import String, create_engine, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idemq import migrate
from idemq.http import IdempotencyKeys

#: From this amount on the bank takes its time.
LARGE = 50

engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    customer: Mapped[str] = mapped_column(String(50), primary_key=True)
    balance: Mapped[int]


class Debit(Base):
    __tablename__ = "debits"
    number: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(String(50))
    amount: Mapped[int]


class Payment(BaseModel):
    amount: int


class Receipt(BaseModel):
    debit: int
    left: int


def customer_of(request: Request) -> str:
    """Whose request it is. A real shop finds that out from a token or a session."""
    customer = request.headers.get("Customer")
    if not customer:
        raise HTTPException(401, "say who you are")
    return customer


keys = IdempotencyKeys(engine, caller=customer_of)
app = FastAPI()
app.add_middleware(keys.middleware)


@app.post("/payments", status_code=201)
def pay(
    payment: Payment,
    customer: Annotated[str, Depends(customer_of)],
    session: Annotated[Session, Depends(keys.session)],
) -> Receipt:
    paid = session.execute(
        update(Account)
        .where(Account.customer == customer, Account.balance >= payment.amount)
        .values(balance=Account.balance - payment.amount)
        .returning(Account.balance)
    ).scalar_one_or_none()
    if paid is None:
        raise HTTPException(402, "not enough money")
    debit = Debit(customer=customer, amount=payment.amount)
    session.add(debit)
    session.flush()
    if payment.amount >= LARGE:
        bank(customer)
    return Receipt(debit=debit.number, left=paid)


def bank(customer: str) -> None:
    """Somebody else's service, which is slow."""
    with Path("bank.log").open("a") as log:
        log.write(f"{customer}\n")
    time.sleep(0.5)


def main() -> None:
    with engine.begin() as connection:
        migrate.upgrade(connection)
        Base.metadata.create_all(connection)


if __name__ == "__main__":
    main()
