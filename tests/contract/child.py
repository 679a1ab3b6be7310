"""Settles nothing and prints each id until it is killed: `python -m tests.contract.child SPEC`."""

import sys
import threading
from collections.abc import Sequence

from idemq.broker import Delivery
from tests.contract.brokers import attach
from tests.contract.inbox import ids


def show(deliveries: Sequence[Delivery]) -> None:
    for identifier in ids(deliveries):
        print(identifier, flush=True)


if __name__ == "__main__":
    subscription = attach(sys.argv[1]).source().subscribe("child", show, 5)
    threading.Event().wait()
