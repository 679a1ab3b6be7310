"""A broker that dies under a worker and comes back, with both kinds of handlers."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import URL

from idemq import Message, embedded_consumer
from tests.contract.brokers import Broker, EmbeddedBroker, KafkaBroker, RabbitBroker
from tests.contract.running import Make, once_each, sent
from tests.servers import eventually

#: The one in the middle of which the broker goes away, and as many as wait in the worker and in the broker.
HELD, LATER = "m1", range(51, 61)


@dataclass
class Mortal:
    """A broker, and how it goes away and comes back."""

    broker: Broker
    down: Callable[[], object]
    up: Callable[[], object]


@pytest.fixture
def mortal(
    request: pytest.FixtureRequest, tmp_path: Path, unique: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mortal]:
    with ExitStack() as stack:
        if request.param == "kafka":
            kafka = request.getfixturevalue("own_kafka")
            container = kafka.container.get_wrapped_container()
            made = Mortal(KafkaBroker(kafka.servers, unique), container.kill, container.start)
        elif request.param == "rabbitmq":
            rabbit = request.getfixturevalue("own_rabbitmq")
            # RabbitMQ 3.10 does not answer for a quorum queue that was new when it was killed.
            broker = RabbitBroker(rabbit.url, unique, "rabbitmq-classic")
            made = Mortal(broker, rabbit.kill, rabbit.start)
        else:  # it has no server that could die: its file lets nobody in
            monkeypatch.setattr(embedded_consumer, "SILENT", 1.0)
            file = tmp_path / "broker.db"
            other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            stack.callback(other.close)
            made = Mortal(
                EmbeddedBroker(str(file), unique),
                lambda: other.execute("BEGIN EXCLUSIVE"),
                lambda: other.execute("ROLLBACK"),
            )
        made.broker.create()
        yield made
        made.broker.remove()


@pytest.fixture
def broker(mortal: Mortal) -> Broker:
    return mortal.broker


@pytest.mark.hazard("H9")
@pytest.mark.hazard("H33")
@pytest.mark.parametrize("mortal", ["embedded", "rabbitmq", "kafka"], indirect=True)
def test_a_worker_goes_on_by_itself_after_its_broker_was_away(mortal: Mortal, make: Make, url: URL) -> None:
    """What was being worked on is done once, and nothing that happens to the broker ends the worker."""
    broker = mortal.broker
    entered, back = threading.Event(), threading.Event()
    begun: list[str | None] = []

    def hold(message: Message) -> None:
        begun.append(message.id)
        if message.id == HELD and not back.is_set():
            entered.set()
            assert back.wait(90)

    shop = make(hold)
    broker.publish(sent(*range(1, 51)))
    with shop.running() as worker:
        (consumer,) = worker.consumers
        assert entered.wait(90)
        mortal.down()
        back.set()  # it commits while nobody can be told
        eventually(lambda: shop.counts()[HELD] == 1)
        eventually(lambda: not consumer.subscription.connected, "the loss noticed")
        mortal.up()
        eventually(lambda: consumer.subscription.connected, "connected again")
        broker.publish(sent(*LATER))
        eventually(lambda: len(shop.counts()) == 60, "all effects")
        eventually(lambda: begun.count("m60") == 1)
        if isinstance(broker, KafkaBroker):
            eventually(lambda: broker.left() == 0, "lag 0")
        assert worker.failure is None
        assert consumer.counts["failures"] == consumer.counts["dead"] == 0
    assert shop.counts() == once_each(*range(1, 61))
    assert begun.count(HELD) == 1, "a copy of it found its claim"
    # The copy of what was being worked on may have been given back at the end.
    assert broker.left() <= 1
