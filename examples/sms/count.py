"""Count receipts and texts of the published payments; exits with 1 when one was lost or doubled.

Reads published.txt, the shop's table and the gateway's log; idemq's own tables are not asked.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway import FAULTS
from sqlalchemy import NullPool, create_engine, text


@dataclass(frozen=True)
class Counts:
    payments: int
    messages: int
    receipts: int
    texts: int
    troubled: int
    asked_again: int
    lost: int
    double: int


def gateway_log(kind: str) -> Iterator[str]:
    for line in Path("gateway.log").read_text().splitlines():
        answer, _, payment = line.partition(" ")
        if answer == kind:
            yield payment


def select(query: str) -> Iterator[str]:
    """The first column of what is found in the shop's database."""
    engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///shop.db"), poolclass=NullPool)
    with engine.connect() as connection:
        yield from connection.execute(text(query)).scalars()


def counts() -> Counts:
    published = Counter(Path("published.txt").read_text().split())
    receipts, texts = Counter(select("SELECT payment FROM receipts")), Counter(gateway_log("sent"))
    return Counts(
        payments=len(published),
        messages=published.total(),
        receipts=sum(receipts[payment] for payment in published),
        texts=sum(texts[payment] for payment in published),
        troubled=sum(payment in published for fault in FAULTS for payment in gateway_log(fault)),
        asked_again=sum(payment in published for payment in gateway_log("again")),
        lost=sum(not (receipts[payment] and texts[payment]) for payment in published),
        double=sum(receipts[payment] > 1 or texts[payment] > 1 for payment in published),
    )


def main() -> None:
    found = counts()
    print(f"payments      {found.payments:5}   in {found.messages} messages (published.txt)")
    print(f"receipts      {found.receipts:5}   the shop's table")
    print(f"texts         {found.texts:5}   the gateway's log")
    print(f"troubled      {found.troubled:5}   the gateway's log: refused, dropped, hung, slow or a 500")
    print(f"asked again   {found.asked_again:5}   the gateway's log: the same key, no second text")
    print(f"lost          {found.lost:5}   payments without a receipt or without a text")
    print(f"double        {found.double:5}   payments with two receipts or two texts")
    sys.exit(1 if found.lost or found.double else 0)


if __name__ == "__main__":
    main()
