"""Per key in order with running workers on real brokers: rebalances, stops, frozen and killed processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import URL
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import Message
from tests.contract.brokers import Broker, KafkaBroker, RabbitBroker
from tests.contract.running import Act, Shop, sent
from tests.servers import eventually

ORDERED: dict[str, Any] = {"ordered": True, "key": "key"}


@pytest.fixture
def broker(request: pytest.FixtureRequest, unique: str) -> Iterator[Broker]:
    if request.param == "kafka":
        made: Broker = KafkaBroker(request.getfixturevalue("kafka_servers"), unique)
    else:
        made = RabbitBroker(request.getfixturevalue("rabbitmq_url"), unique, request.param, single=True)
    made.create()
    yield made
    made.remove()


def brokers(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("broker", kinds, indirect=True)


EVERY = ("kafka", "rabbitmq", "rabbitmq-classic")

Make = Callable[..., Shop]


@pytest.fixture
def make(broker: Broker, postgres_url: URL) -> Iterator[Make]:
    shops: list[Shop] = []

    def shop(act: Act = lambda message: None, kind: str = "sync", **options: Any) -> Shop:
        shops.append(Shop(postgres_url, broker.source(), kind, act, **{**ORDERED, **options}))
        return shops[-1]

    yield shop
    for each in shops:
        each.dispose()


@dataclass
class Gate:
    """A handler that waits, at the messages that are named, until they are let go."""

    held: set[str] = field(default_factory=set)
    begun: list[str | None] = field(default_factory=list)

    def __call__(self, message: Message) -> None:
        self.begun.append(message.id)
        while message.id in self.held:
            time.sleep(0.005)


def ids(*numbers: int) -> list[str]:
    return [f"m{number}" for number in numbers]


@pytest.mark.hazard("H34")
@brokers(*EVERY)
def test_a_worker_that_stops_leaves_no_gap_for_the_next_one(broker: Broker, make: Make) -> None:
    """It has messages that it did not begin; who comes next must not begin behind them."""
    gate = Gate({"m1"})
    stopping, other = make(gate, prefetch=4), make()
    broker.publish(sent(*range(1, 13)), headers={"key": "a"})
    with stopping.running() as worker:
        eventually(lambda: gate.begun == ["m1"], 20)
        with other.running():
            ending = threading.Thread(target=worker.stop)
            ending.start()
            ending.join()
            time.sleep(1.5)  # for what must not come
            assert other.order() == []
            gate.held.clear()
            eventually(lambda: len(other.counts()) == 12, 60)
    assert other.order() == ids(*range(1, 13))
