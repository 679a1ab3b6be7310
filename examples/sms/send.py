"""Publish payments, a third of them twice: `python send.py 200`.

Their ids are new each time and are added to published.txt, one line for each message.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from brokers import broker


def messages(count: int) -> Sequence[str]:
    """`count` payments in random order; of the copies, half follow at once and half come at the end."""
    payments = [f"pay-{uuid4()}" for _ in range(count)]
    twice = set(random.sample(payments, count // 3))
    sent: list[str] = []
    late: list[str] = []
    for number, payment in enumerate(payments):
        sent.append(payment)
        if payment in twice:
            (sent if number % 2 else late).append(payment)
    return sent + late


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    published = messages(count)
    target = broker()
    target.source().check()  # makes the queue or topic
    target.publish(published)
    with Path("published.txt").open("a") as file:
        file.writelines(f"{payment}\n" for payment in published)
    print(f"{count} payments in {len(published)} messages")


if __name__ == "__main__":
    main()
