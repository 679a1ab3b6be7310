"""Per key in order with running workers: waits, stops, frozen and killed processes.

The embedded broker gives messages of one queue to several workers and has no order to keep: it refuses.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, make_url, text
from tenacity import Retrying, stop_after_attempt, wait_fixed

from idemq import Message, RetryLater
from idemq.embedded import Embedded
from idemq.errors import SetupError
from tests.attacked import Field, attacked, children, freeze
from tests.contract.brokers import Broker, KafkaBroker, RabbitBroker
from tests.contract.running import Act, Make, Shop, sent
from tests.servers import eventually
from tests.test_attacks import IDLE_ENDS

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


@pytest.fixture
def make(broker: Broker, kind: str, postgres_url: URL) -> Iterator[Make]:
    shops: list[Shop] = []

    def shop(act: Act = lambda message: None, **options: Any) -> Shop:
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
        eventually(lambda: gate.begun == ["m1"])
        with other.running():
            ending = threading.Thread(target=worker.stop)
            ending.start()
            ending.join()
            time.sleep(1.5)  # for what must not come
            assert other.order() == []
            gate.held.clear()
            eventually(lambda: len(other.counts()) == 12)
    assert other.order() == ids(*range(1, 13))


@pytest.mark.hazard("H35")
@brokers("kafka", "rabbitmq")
def test_one_of_a_key_at_a_time_and_different_keys_side_by_side(
    broker: Broker, make: Make, kind: str
) -> None:
    running, most = Counter[str](), Counter[str]()
    together = threading.Event()

    def watch(message: Message) -> None:
        key = str(message.headers["key"])
        running[key] += 1
        most[key] = max(most[key], running[key])
        if len(+running) > 1:
            together.set()
        time.sleep(0.002)
        running[key] -= 1

    async def watch_async(message: Message) -> None:
        key = str(message.headers["key"])
        running[key] += 1
        most[key] = max(most[key], running[key])
        if len(+running) > 1:
            together.set()
        await asyncio.sleep(0.002)
        running[key] -= 1

    shop = make(watch_async if kind == "async" else watch, concurrency=4)
    for start in range(1, 61, 3):  # keys a and b take turns
        broker.publish(sent(start, start + 1), headers={"key": "a"})
        broker.publish(sent(start + 2), headers={"key": "b"})
    with shop.running():
        eventually(lambda: len(shop.counts()) == 60)
    assert together.is_set()
    assert most == Counter(a=1, b=1)
    done = [int(each[1:]) for each in shop.order()]
    for key in ([n for n in done if n % 3], [n for n in done if not n % 3]):
        assert key == sorted(key)
    assert broker.left() == 0


@pytest.mark.hazard("H35")
@brokers("kafka", "rabbitmq")
def test_a_short_wait_holds_its_key_and_no_other(broker: Broker, make: Make) -> None:
    failed, overtook = list[str | None](), list[str | None]()

    def act(message: Message) -> None:
        if message.id == "m1" and len(failed) < 2:
            failed.append(message.id)
            raise ValueError("on purpose")
        overtook.append(message.id)

    shop = make(act, concurrency=4, retry=Retrying(stop=stop_after_attempt(5), wait=wait_fixed(0.5)))
    broker.publish(sent(1, 2, 3), headers={"key": "a"})
    broker.publish(sent(4), headers={"key": "b"})
    with shop.running():
        eventually(lambda: len(shop.counts()) == 4)
    assert overtook == ids(4, 1, 2, 3)
    assert (shop.order(), shop.failed()) == (ids(4, 1, 2, 3), [])


@pytest.mark.hazard("H35")
@brokers("kafka", "rabbitmq")
def test_what_waits_in_the_table_is_run_in_order_by_whoever_comes(broker: Broker, make: Make) -> None:
    def act(message: Message) -> None:
        if message.id == "m1" and broken.is_set():
            raise RetryLater(2)

    broken = threading.Event()
    broken.set()
    first, second = make(act, concurrency=4), make(act, concurrency=4)
    broker.publish(sent(1, 2, 3, 4, 5), headers={"key": "a"})
    broker.publish(sent(6), headers={"key": "b"})
    with first.running():
        eventually(lambda: first.waiting() == 5)
        eventually(lambda: first.order() == ids(6))
    broken.clear()
    with first.running(), second.running():
        broker.publish(sent(7, 8), headers={"key": "a"})
        eventually(lambda: len(first.counts()) == 8)
    assert first.order() == ids(6, 1, 2, 3, 4, 5, 7, 8)
    assert first.failed() == []


@pytest.mark.hazard("H35")
@brokers("kafka", "rabbitmq")
def test_a_key_that_cannot_be_told_is_a_dead_letter_and_the_others_stay_in_order(
    broker: Broker, make: Make
) -> None:
    def key(message: Message) -> str:
        if message.headers["key"] == "odd":
            raise SystemExit(3)  # on the broker's thread
        return str(message.headers["key"])

    shop = make(lambda message: None, concurrency=4, key=key)
    for start in range(1, 22, 4):
        broker.publish(sent(start, start + 1, start + 2), headers={"key": "a"})
        broker.publish(sent(start + 3), headers={"key": "odd"})
    with shop.running() as worker:
        eventually(lambda: len(shop.counts()) == 18)
        eventually(lambda: len(shop.dead()) == 6)
        assert worker.failure is None
    assert shop.order() == ids(*[n for n in range(1, 25) if n % 4])
    assert {reason for reason, _ in shop.dead()} == {"unreadable"}
    assert broker.left() == 0


def test_the_embedded_broker_refuses_to_order(tmp_path: Path, kind: str) -> None:
    url, queue = make_url(f"sqlite:///{tmp_path / 'shop.db'}"), Embedded(tmp_path / "broker.db").queue("q")
    with pytest.raises(SetupError, match="ordered"):
        Shop(url, queue, kind, **ORDERED)


# ---- processes


@pytest.fixture
def scene(broker: Broker, kind: str, tmp_path: Path, postgres_url: URL) -> Iterator[tuple[Field, Shop]]:
    with attacked(tmp_path, postgres_url, broker, kind) as (field, shop):
        field.options = {**ORDERED, "prefetch": 8}
        yield field, shop


@pytest.mark.hazard("H34")
@pytest.mark.hazard("H35")
@pytest.mark.parametrize("end", ["thawed", "killed"])
@brokers("kafka", "rabbitmq")
def test_a_worker_frozen_in_its_transaction_is_overtaken_by_nobody(
    broker: Broker, scene: tuple[Field, Shop], end: str
) -> None:
    field, shop = scene
    field.hold("m2")
    frozen = field.start()
    broker.publish(sent(*range(1, 11)), headers={"key": "a"})
    eventually(lambda: [id for _, id in field.begun()] == ids(1, 2))
    freeze(frozen.pid, *children(frozen.pid))
    field.release()
    other = field.start()
    eventually(lambda: "its twin is still in flight" in field.log() or shop.waiting() > 1)
    broker.publish(sent(11, 12), headers={"key": "a"})
    for pid in (*children(frozen.pid), frozen.pid):
        os.kill(pid, signal.SIGCONT if end == "thawed" else signal.SIGKILL)
    eventually(lambda: len(shop.counts()) == 12)
    assert shop.order() == ids(*range(1, 13))
    assert field.end(other) == 0
    assert shop.failed() == []


@pytest.mark.hazard("H34")
@pytest.mark.hazard("H35")
@brokers("kafka", "rabbitmq")
def test_a_worker_frozen_between_messages_does_not_run_ahead_when_it_thaws(
    broker: Broker, scene: tuple[Field, Shop]
) -> None:
    field, shop = scene
    broker.publish(sent(1), headers={"key": "a"})
    frozen = field.start("--child")
    eventually(lambda: shop.order() == ids(1))
    field.hold("m3")
    broker.publish(sent(*range(2, 8)), headers={"key": "a"})
    eventually(lambda: field.begun()[-1][1] == "m3")
    freeze(frozen.pid)
    with shop.engine.connect() as connection:  # nothing of it is left in the database, only in its memory
        connection.execute(text(IDLE_ENDS))
    other = field.start("--child")
    eventually(lambda: (other.pid, "m3") in field.begun() or shop.waiting() > 1)
    frozen.send_signal(signal.SIGCONT)  # both have m3, the one with a transaction that has ended
    broker.publish(sent(8, 9), headers={"key": "a"})
    field.release()
    eventually(lambda: len(shop.counts()) == 9)
    assert shop.order() == ids(*range(1, 10))
    assert [field.end(each) for each in (frozen, other)] == [0, 0]
    assert shop.failed() == []
