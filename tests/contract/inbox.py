"""What a subscription delivered, for tests to wait on."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from idemq.broker import Delivery, Source, Subscription
from idemq.message import message_id


class Inbox:
    """Takes deliveries; `take` waits for them."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._arrived.put(delivery)

    def take(self, count: int = 1, seconds: float = 90.0) -> list[Delivery]:
        """The next `count` deliveries; fails when one does not come within `seconds`."""
        taken: list[Delivery] = []
        for _ in range(count):
            try:
                taken.append(self._arrived.get(timeout=seconds))
            except queue.Empty:
                raise AssertionError(f"only {len(taken)} of {count} deliveries came: {ids(taken)}") from None
        return taken

    def quiet(self, seconds: float = 0.5) -> bool:
        """Whether nothing comes for so long. No event tells that nothing will come: the one wait by time."""
        try:
            self._arrived.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    @property
    def empty(self) -> bool:
        return self._arrived.empty()


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [message_id(delivery.message, None) for delivery in deliveries]


def ack(deliveries: Sequence[Delivery]) -> None:
    """As the worker does: start, then ack."""
    for delivery in deliveries:
        assert delivery.start()
        delivery.ack()


@contextmanager
def consuming(source: Source, prefetch: int = 100) -> Iterator[tuple[Inbox, Subscription]]:
    """An inbox and the subscription that fills it; closed at the end."""
    inbox = Inbox()
    subscription = source.subscribe("contract", inbox, prefetch)
    try:
        yield inbox, subscription
    finally:
        subscription.close(10)
