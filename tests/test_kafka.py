from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import KafkaError
from sqlalchemy import make_url

from idemq import kafka_epochs
from idemq.broker import Delivery, Subscription
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka import Kafka, Topic
from idemq.kafka_consumer import KafkaSubscription
from idemq.kafka_session import Session
from idemq.message import Message
from tests import kafka_tools as tools
from tests.contract.brokers import KafkaBroker
from tests.contract.running import Shop
from tests.servers import eventually, free_port


class Inbox:
    """A worker in small: takes deliveries and keeps them, or settles each with `work`."""

    def __init__(self, work: Callable[[Delivery], None] | None = None) -> None:
        self.deliveries: list[Delivery] = []
        self.batches: list[int] = []
        self.lock = threading.Lock()
        self._work = work

    def __call__(self, deliveries: Sequence[Delivery]) -> None:
        with self.lock:
            self.deliveries += deliveries
            self.batches.append(len(deliveries))
        if self._work is not None:
            for delivery in deliveries:
                self._work(delivery)

    @property
    def messages(self) -> list[Message]:
        with self.lock:
            return [delivery.message for delivery in self.deliveries]

    @property
    def bodies(self) -> list[bytes | None]:
        return [message.body for message in self.messages]

    def wait(self, count: int) -> None:
        eventually(lambda: len(self.deliveries) >= count, f"{count} deliveries, got {len(self.deliveries)}")


def finish(delivery: Delivery) -> None:
    if delivery.start():
        delivery.ack()
    else:
        delivery.drop()


@contextmanager
def reading(
    source: Topic, inbox: Inbox, prefetch: int = 1000, consumer: str = "test"
) -> Iterator[Subscription]:
    subscription = source.subscribe(consumer, inbox, prefetch)
    try:
        yield subscription
    finally:
        subscription.close(10)
        assert not any(thread.name == f"idemq-kafka-{consumer}" for thread in threading.enumerate())


def source(servers: str, topic: str, **options: Any) -> Topic:
    chosen: dict[str, Any] = {"group": f"g-{topic}", "session_timeout": 6.0} | options
    return Kafka(servers).topic(topic, **chosen)


def caught_up(servers: str, topic: str, partitions: int = 1, group: str | None = None) -> bool:
    """The lag is 0."""
    ends = tools.ends(servers, topic, partitions)
    committed = tools.committed(servers, group or f"g-{topic}", topic)
    return all(committed.get(partition, 0) == end for partition, end in ends.items())


def test_records_arrive_with_all_they_carry(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique)
    headers = [
        ("content-type", b"text/plain"),
        ("message-id", b"m1"),
        ("raw", b"\xff"),
        ("x", b"1"),
        ("x", b"2"),
    ]
    tools.produce(kafka_servers, unique, [b"one"], keys=True, headers=headers)
    inbox = Inbox(finish)

    with reading(source(kafka_servers, unique), inbox) as subscription:
        inbox.wait(1)
        assert subscription.connected
        assert subscription.failure is None

    (message,) = inbox.messages
    assert (message.body, message.key, message.id, message.redelivered) == (b"one", b"one", None, False)
    assert message.headers == {
        "content-type": "text/plain", "message-id": "m1", "raw": b"\xff", "x": "2"
    }  # fmt: skip
    assert message.repeated == {"x"}
    assert message.content_type == "text/plain"
    assert message.sent_at is not None
    assert abs(message.sent_at.timestamp() - time.time()) < 60
    assert message.origin == {"broker": "kafka", "topic": unique, "partition": 0, "offset": 0}
    assert tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 1}


# ---- declaration and start


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"servers": "kafka://localhost:9092"}, "without scheme"),
        ({"servers": ""}, "host:port"),
        ({"servers": "localhost:9092", "name": ""}, "name="),
        ({"servers": "localhost", "security_protocol": "TLS"}, "security_protocol"),
        ({"servers": "localhost", "ssl_cafile": "x.pem"}, "ssl_cafile.*security_protocol"),
        ({"servers": "localhost", "security_protocol": "SSL", "ssl_cafile": "/no/such.pem"}, "ssl_cafile"),
        ({"servers": "localhost", "security_protocol": "SSL", "ssl_keyfile": "k"}, "ssl_certfile"),
        ({"servers": "localhost", "sasl_username": "u"}, "sasl_username.*security_protocol"),
        ({"servers": "localhost", "security_protocol": "SASL_SSL"}, "sasl_mechanism"),
        (
            {
                "servers": "localhost",
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "PLAIN",
                "sasl_username": "u",
            },
            "sasl_password",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(SetupError, match=names):
        Kafka(**options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"name": "a b", "group": "g"}, "A-Z"),
        ({"name": "t", "group": ""}, "group="),
        ({"name": "t", "group": "g", "partitions": 0}, "partitions=0"),
        ({"name": "t", "group": "g", "session_timeout": 10_000_000}, "session_timeout"),
        ({"name": "t", "group": "g", "stuck_after": 0}, "stuck_after"),
        ({"name": "t", "group": "g", "stuck_after": 5, "rebalance_timeout": 6}, "stuck_after"),
    ],
)
def test_a_wrong_topic_option_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(SetupError, match=names):
        Kafka("localhost").topic(**options)


@pytest.mark.hazard("H60")
def test_a_prefetch_of_nothing_is_refused() -> None:
    with pytest.raises(SetupError, match="prefetch=0"):
        source("localhost", "t").subscribe("test", Inbox(), 0)


def test_a_missing_topic_is_named_with_its_remedy_and_not_created(kafka_servers: str, unique: str) -> None:
    with pytest.raises(SetupError, match=f"(?s){unique}.*declare=True"):
        source(kafka_servers, unique).check()
    assert unique not in tools.topics(kafka_servers)

    inbox = Inbox()
    with reading(source(kafka_servers, unique), inbox) as subscription:
        eventually(lambda: subscription.failure, what="the failure")
        assert isinstance(subscription.failure, SetupError)
        assert not subscription.connected
    assert unique not in tools.topics(kafka_servers)


def test_a_session_timeout_that_the_broker_refuses_is_told(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique)
    with reading(source(kafka_servers, unique, session_timeout=2.0), Inbox()) as subscription:
        eventually(lambda: subscription.failure, what="the failure")
        assert "session_timeout=" in str(subscription.failure)


def test_a_declared_topic_is_created_once(kafka_servers: str, unique: str) -> None:
    declared = source(kafka_servers, unique, declare=True, partitions=3)
    declared.check()
    declared.check()
    assert set(tools.ends(kafka_servers, unique, 3)) == {0, 1, 2}


def test_an_unreachable_cluster_is_told_in_one_line_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = source(f"localhost:{free_port()}", "t")
    with pytest.raises(BrokerUnavailable, match="kafka://localhost"):
        nowhere.check()

    with caplog.at_level(logging.INFO), reading(nowhere, Inbox()) as subscription:
        eventually(lambda: len(caplog.records) >= 2, what="two tries")
        assert subscription.failure is None
        assert not subscription.connected
    assert {record.name for record in caplog.records} == {"idemq.kafka"}
    assert all(record.exc_info is None and "\n" not in record.getMessage() for record in caplog.records)


# ---- what is awkward on a topic


@pytest.mark.hazard("H24")
def test_records_that_cannot_be_decoded_are_delivered_as_such_and_hold_up_nothing(
    kafka_servers: str, unique: str
) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    tools.produce(kafka_servers, unique, [b"first"], partition=0)
    tools.produce_odd_header(kafka_servers, unique, [b"odd1", b"odd2"], good=[b"a", b"b", b"c", b"d"])
    tools.produce(kafka_servers, unique, [b"last"], partition=0)
    tools.produce(kafka_servers, unique, [b"n%d" % n for n in range(100)], partition=1)
    inbox = Inbox(finish)

    with reading(source(kafka_servers, unique), inbox, prefetch=7):
        inbox.wait(108)
        eventually(lambda: caught_up(kafka_servers, unique, 2), what="lag 0")

    in_order = [message for message in inbox.messages if message.origin["partition"] == 0]
    assert [message.body for message in in_order] == [
        b"first",
        b"a",
        b"b",
        b"odd1",
        b"odd2",
        b"c",
        b"d",
        b"last",
    ]
    assert [message.origin["offset"] for message in in_order] == list(range(8))
    odd = [message for message in in_order if message.unreadable]
    assert [message.body for message in odd] == [b"odd1", b"odd2"]
    assert "not UTF-8" in str(odd[0].unreadable)
    assert odd[0].key == b"key"
    assert len(inbox.bodies) == len({*inbox.bodies}), "nothing twice"


@pytest.mark.hazard("H37")
def test_tombstones_and_transactions_leave_no_lag(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique)
    tools.produce(kafka_servers, unique, [b"one", None], partition=0)
    tools.produce_transaction(kafka_servers, unique, [b"kept"], commit=True)
    tools.produce_transaction(kafka_servers, unique, [b"aborted1", b"aborted2"], commit=False)
    inbox = Inbox(finish)

    with reading(source(kafka_servers, unique), inbox):
        inbox.wait(3)
        eventually(lambda: caught_up(kafka_servers, unique), what="lag 0")
        assert tools.ends(kafka_servers, unique, 1) == {0: 7}
    assert inbox.bodies == [b"one", None, b"kept"]

    tools.produce_transaction(kafka_servers, unique, [b"more"], commit=False)
    with reading(source(kafka_servers, unique), inbox):  # nothing but a tail without records
        eventually(lambda: caught_up(kafka_servers, unique), what="lag 0")
    assert len(inbox.bodies) == 3


@pytest.mark.hazard("H37")
def test_the_tail_is_not_passed_while_a_record_before_it_is_unfinished(
    kafka_servers: str, unique: str
) -> None:
    tools.create_topic(kafka_servers, unique)
    tools.produce_transaction(kafka_servers, unique, [b"one", b"two"], commit=True)
    inbox = Inbox()
    with reading(source(kafka_servers, unique), inbox):
        inbox.wait(2)
        finish(inbox.deliveries[0])
        eventually(
            lambda: tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 1},
            what="commit of the first",
        )
        finish(inbox.deliveries[1])
        eventually(
            lambda: tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 3}, what="commit of the tail"
        )


@pytest.mark.hazard("H59")
def test_a_record_above_the_fetch_size_gets_through(kafka_servers: str, unique: str) -> None:
    size = 3_000_000
    tools.create_topic(kafka_servers, unique, configs={"max.message.bytes": str(2 * size)})
    values = [b"before", b"x" * size, b"after"]
    tools.produce(kafka_servers, unique, values, partition=0, max_request_size=2 * size)
    inbox = Inbox(finish)
    with reading(source(kafka_servers, unique), inbox):
        inbox.wait(3)
    assert inbox.bodies == values


# ---- back-pressure and the end


@pytest.mark.hazard("H60")
def test_at_most_prefetch_deliveries_are_unsettled(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    tools.produce(kafka_servers, unique, [b"%d" % n for n in range(100)])
    inbox = Inbox()
    with reading(source(kafka_servers, unique), inbox, prefetch=10):
        settled = 0
        while settled < 100:
            inbox.wait(settled + 1)
            assert len(inbox.deliveries) - settled <= 10
            finish(inbox.deliveries[settled])
            settled += 1
        eventually(lambda: caught_up(kafka_servers, unique, 2), what="lag 0")


def test_a_held_record_stops_its_partition_at_the_cap_and_no_other(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    tools.produce(kafka_servers, unique, [b"a%d" % n for n in range(1_500)], partition=0)
    held: list[Delivery] = []

    def hold_the_first(delivery: Delivery) -> None:
        if delivery.message.body == b"a0":
            held.append(delivery)
        else:
            finish(delivery)

    inbox = Inbox(hold_the_first)
    with reading(source(kafka_servers, unique), inbox, prefetch=5_000):
        inbox.wait(1_000)
        tools.produce(kafka_servers, unique, [b"b%d" % n for n in range(1_500)], partition=1)
        inbox.wait(2_500)
        assert sum(body is not None and body.startswith(b"a") for body in inbox.bodies) == 1_000
        assert tools.committed(kafka_servers, f"g-{unique}", unique).get(0, 0) == 0
        finish(held[0])
        inbox.wait(3_000)
        eventually(lambda: caught_up(kafka_servers, unique, 2), what="lag 0")


def test_a_paused_subscription_takes_nothing_more_but_commits(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique)
    tools.produce(kafka_servers, unique, [b"one"])
    inbox = Inbox()
    with reading(source(kafka_servers, unique), inbox) as subscription:
        inbox.wait(1)
        subscription.pause()
        tools.produce(kafka_servers, unique, [b"two"])
        finish(inbox.deliveries[0])
        eventually(lambda: tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 1}, what="the commit")
    assert inbox.bodies == [b"one"]


@pytest.mark.hazard("H54")
def test_closing_commits_what_is_finished_and_leaves_the_group_at_once(
    kafka_servers: str, unique: str
) -> None:
    tools.create_topic(kafka_servers, unique)
    tools.produce(kafka_servers, unique, [b"one", b"two", b"three"])
    inbox = Inbox()
    subscription = source(kafka_servers, unique, session_timeout=60).subscribe("test", inbox, 10)
    inbox.wait(3)
    finish(inbox.deliveries[0])
    for delivery in inbox.deliveries[1:]:
        delivery.drop()
    subscription.close(10)

    assert tools.members(kafka_servers, f"g-{unique}") == ("Empty", [])
    assert tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 1}
    again = Inbox(finish)
    with reading(source(kafka_servers, unique), again):
        again.wait(2)
    assert again.bodies == [b"two", b"three"]


# ---- rebalances


@pytest.mark.hazard("H31")
def test_back_pressure_holds_through_a_rebalance(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    for partition in (0, 1):
        tools.produce(kafka_servers, unique, [b"%d" % n for n in range(50)], partition=partition)
    topic = source(kafka_servers, unique, rebalance_timeout=2.0)
    first, second = Inbox(), Inbox(finish)
    with reading(topic, first, prefetch=5, consumer="first") as held:
        first.wait(1)  # otherwise the second may have read all before the first is there
        with reading(topic, second, consumer="second"):
            second.wait(50)  # the rebalance is over
            eventually(lambda: held.connected, what="the first member's return")
            assert len(first.deliveries) <= 5
            for delivery in first.deliveries[:5]:
                finish(delivery)
            first.wait(6)
            assert len(first.deliveries) <= 10


@pytest.mark.hazard("H31")
def test_a_paused_subscription_stays_paused_through_a_rebalance(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    topic = source(kafka_servers, unique)
    first, second = Inbox(finish), Inbox(finish)
    with reading(topic, first, consumer="first") as paused:
        eventually(lambda: paused.connected, what="the first member")
        paused.pause()
        with reading(topic, second, consumer="second") as other:
            eventually(lambda: other.connected, what="the second member")
            for partition in (0, 1):
                tools.produce(kafka_servers, unique, [b"%d" % partition], partition=partition)
            second.wait(1)
            eventually(lambda: len(tools.members(kafka_servers, f"g-{unique}")[1]) == 2, what="two members")
        assert first.bodies == []


@pytest.mark.hazard("H34")
def test_a_late_acknowledgement_of_an_old_assignment_commits_nothing(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique, partitions=2)
    for partition in (0, 1):
        tools.produce(
            kafka_servers, unique, [b"%d-%d" % (partition, n) for n in range(3)], partition=partition
        )
    topic = source(kafka_servers, unique, rebalance_timeout=2.0)
    first, second = Inbox(), Inbox()
    with reading(topic, first, consumer="first"):
        first.wait(6)
        assert all(delivery.start() for delivery in first.deliveries)
        finish(first.deliveries[0])
        done = first.deliveries[0].message.origin["partition"]
        with reading(topic, second, consumer="second") as other:
            second.wait(2)  # the drain of the first member has run out, and its epochs have ended
            old = first.deliveries[1:6]
            assert not any(delivery.start() for delivery in old)
            for delivery in old:
                delivery.ack()
            first.wait(6 + 2)
            eventually(lambda: other.connected, what="the second member")
            time.sleep(0.5)  # more than a commit interval: there is nothing to wait for
            assert tools.committed(kafka_servers, f"g-{unique}", unique).get(1 - done, 0) == 0
            assert tools.committed(kafka_servers, f"g-{unique}", unique).get(done, 0) == 1
            for delivery in [*first.deliveries[6:], *second.deliveries]:
                finish(delivery)
            eventually(lambda: caught_up(kafka_servers, unique, 2), what="lag 0")


class Ledger:
    """Who finished what, and whether the commits keep to it."""

    def __init__(self, expected: set[bytes]) -> None:
        self.expected = expected
        self.acked: dict[int, set[int]] = {}
        self.bodies: set[bytes] = set()
        self.lock = threading.Lock()

    def note(self, message: Message) -> None:
        """Before the acknowledgement, so that a commit can never be seen first."""
        with self.lock:
            self.acked.setdefault(message.origin["partition"], set()).add(message.origin["offset"])
            assert message.body is not None
            self.bodies.add(message.body)

    def check(self, committed: dict[int, int]) -> None:
        with self.lock:
            for partition, position in committed.items():
                missing = set(range(position)) - self.acked.get(partition, set())
                assert not missing, (
                    f"partition {partition} committed {position} without {sorted(missing)[:5]}"
                )


@pytest.mark.hazard("H10")
@pytest.mark.hazard("H34")
def test_a_storm_of_rebalances_loses_nothing(kafka_servers: str, unique: str) -> None:
    partitions, count, seconds = 4, 4_000, 12.0
    tools.create_topic(kafka_servers, unique, partitions=partitions)
    expected = {b"%d" % n for n in range(count)}
    tools.produce(kafka_servers, unique, sorted(expected), keys=True)
    ledger = Ledger(expected)
    topic = source(kafka_servers, unique, rebalance_timeout=1.5)
    stop = threading.Event()
    chance = random.Random(7)

    def later(pool: ThreadPoolExecutor, delivery: Delivery) -> None:
        pause = chance.random() * 0.02

        def work() -> None:
            if not delivery.start():
                delivery.drop()
                return
            stop.wait(pause)
            ledger.note(delivery.message)
            delivery.ack()

        pool.submit(work)

    def member(number: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            while not stop.is_set():
                inbox = Inbox(partial(later, pool))
                subscription = topic.subscribe(f"storm-{number}", inbox, 50)
                stop.wait(1.0 + chance.random() * 2)
                subscription.pause()
                subscription.close(5)

    members = [threading.Thread(target=member, args=(number,)) for number in range(3)]
    for thread in members:
        thread.start()
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until and not expected <= ledger.bodies:
            ledger.check(tools.committed(kafka_servers, f"g-{unique}", unique))
            stop.wait(0.1)
    finally:
        stop.set()
        for thread in members:
            thread.join()

    def finish_and_note(delivery: Delivery) -> None:
        ledger.note(delivery.message)
        finish(delivery)

    with reading(topic, Inbox(finish_and_note)):
        eventually(lambda: caught_up(kafka_servers, unique, partitions), what="lag 0")
    ledger.check(tools.committed(kafka_servers, f"g-{unique}", unique))
    assert ledger.bodies == expected


# ---- on a broker of our own


@pytest.mark.hazard("H17")
def test_a_handler_that_blocks_for_three_session_timeouts_keeps_its_partitions(
    own_kafka: tools.Broker, unique: str
) -> None:
    tools.create_topic(own_kafka.servers, unique)
    tools.produce(own_kafka.servers, unique, [b"slow"])
    release = threading.Event()

    def block(delivery: Delivery) -> None:
        assert delivery.start()
        release.wait(90)
        delivery.ack()

    workers: list[threading.Thread] = []

    def hand_over(delivery: Delivery) -> None:
        workers.append(threading.Thread(target=block, args=(delivery,)))
        workers[-1].start()

    inbox = Inbox(hand_over)
    with reading(source(own_kafka.servers, unique, session_timeout=1.5), inbox, prefetch=1) as subscription:
        inbox.wait(1)
        members = tools.members(own_kafka.servers, f"g-{unique}")
        release.wait(4.5)
        assert subscription.connected
        assert inbox.deliveries[0].start(), "the epoch goes on"
        assert tools.members(own_kafka.servers, f"g-{unique}") == members
        release.set()
        eventually(lambda: caught_up(own_kafka.servers, unique), what="the commit")
    workers[0].join()
    assert inbox.bodies == [b"slow"]


@pytest.mark.hazard("H32")
@pytest.mark.parametrize("fault", ["cancelled", "hanging", "dead coordinator", "hanging commit"])
def test_a_stuck_consumer_is_built_anew(
    own_kafka: tools.Broker,
    unique: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kafka_epochs, "COMMIT_SECONDS", 1.0)
    tools.create_topic(own_kafka.servers, unique)
    tools.produce(own_kafka.servers, unique, [b"one"])
    inbox = Inbox(finish)
    topic = source(own_kafka.servers, unique, session_timeout=1.0, stuck_after=1.5)

    async def hang(*args: object, **options: object) -> None:
        await asyncio.Event().wait()

    def harm(session: Session) -> None:
        """On the loop of the consumer: what a bug or a lost packet would do."""
        if fault == "cancelled":
            next(task for task in asyncio.all_tasks() if task.get_name() == "the fetch loop").cancel()
        elif fault == "hanging":
            session._consumer._fetcher.fetched_records = hang
        elif fault == "hanging commit":
            session._consumer._coordinator.commit_offsets = hang
        else:
            session._consumer._coordinator._coordination_task.cancel()

    with reading(topic, inbox) as subscription, caplog.at_level(logging.WARNING, "idemq.kafka"):
        inbox.wait(1)
        eventually(lambda: caught_up(own_kafka.servers, unique), what="the first commit")
        assert isinstance(subscription, KafkaSubscription)
        assert subscription._loop is not None
        assert subscription._session is not None
        subscription._loop.call_soon_threadsafe(harm, subscription._session)
        tools.produce(own_kafka.servers, unique, [b"two"])
        eventually(
            lambda: b"two" in inbox.bodies and caught_up(own_kafka.servers, unique), what="consumption again"
        )
        eventually(lambda: any("reading again" in text for text in caplog.messages), what="the log line")
        assert subscription.failure is None
        assert all(record.exc_info is None for record in caplog.records)


@pytest.mark.hazard("H33")
def test_reading_goes_on_after_the_broker_restarted(
    own_kafka: tools.Broker, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    tools.create_topic(own_kafka.servers, unique, partitions=2)
    tools.produce(own_kafka.servers, unique, [b"a%d" % n for n in range(100)], keys=True)
    inbox = Inbox(finish)
    topic = source(own_kafka.servers, unique, session_timeout=3.0)
    with reading(topic, inbox) as subscription, caplog.at_level(logging.INFO, "idemq.kafka"):
        inbox.wait(100)
        own_kafka.restart()
        eventually(
            lambda: _produced(own_kafka.servers, unique, [b"b%d" % n for n in range(100)]), "the broker"
        )
        eventually(lambda: len({*inbox.bodies}) == 200, "the records after the restart")
        eventually(lambda: caught_up(own_kafka.servers, unique, 2), "lag 0")
        eventually(lambda: subscription.connected, what="connected")
    assert all(record.exc_info is None for record in caplog.records if record.name == "idemq.kafka")


@pytest.mark.hazard("H17")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_worker_whose_handler_blocks_for_three_session_timeouts_keeps_its_partitions(
    own_kafka: tools.Broker, unique: str, kind: str, tmp_path: Path
) -> None:
    broker = KafkaBroker(own_kafka.servers, unique)
    broker.create()
    broker.publish([("m1", b'{"n": 1}')])
    begun, entered, release = list[str | None](), threading.Event(), threading.Event()

    def block(message: Message) -> None:  # an async handler blocks its event loop, too
        begun.append(message.id)
        entered.set()
        release.wait(90)

    topic = source(own_kafka.servers, unique, session_timeout=1.5)
    shop = Shop(make_url(f"sqlite:///{tmp_path / 'shop.db'}"), topic, kind, block)
    with shop.running() as worker:
        assert entered.wait(90)
        members = tools.members(own_kafka.servers, f"g-{unique}")
        release.wait(4.5)
        assert worker.consumers[0].subscription.connected
        assert tools.members(own_kafka.servers, f"g-{unique}") == members
        release.set()
        eventually(lambda: caught_up(own_kafka.servers, unique), what="the commit")
    assert begun == ["m1"]
    assert shop.counts() == Counter(["m1"])
    shop.dispose()


def _produced(servers: str, topic: str, values: list[bytes]) -> bool:
    try:
        tools.produce(servers, topic, values, keys=True, request_timeout_ms=5_000)
    except (KafkaError, OSError):
        return False
    return True


@pytest.mark.hazard("S7")
def test_the_password_is_shown_nowhere(
    own_kafka: tools.Broker, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    tools.create_topic(own_kafka.servers, unique)
    tools.produce(own_kafka.servers, unique, [b"one"])

    def secured(password: str) -> Topic:
        kafka = Kafka(
            own_kafka.secure,
            security_protocol="SASL_PLAINTEXT",
            sasl_mechanism="PLAIN",
            sasl_username=tools.USER,
            sasl_password=password,
        )
        return kafka.topic(unique, group=f"g-{unique}", session_timeout=2.0)

    inbox = Inbox(finish)
    texts = []
    with caplog.at_level(logging.DEBUG):
        right, wrong = secured(tools.PASSWORD), secured(tools.PASSWORD + "!")
        right.check()
        with reading(right, inbox) as subscription:
            inbox.wait(1)
            texts += [repr(subscription), repr(inbox.deliveries[0]), repr(inbox.messages[0])]
        with pytest.raises(SetupError, match="refuses the connection") as refusal:
            wrong.check()
        with reading(wrong, inbox) as subscription:
            eventually(lambda: subscription.failure, what="the failure")
            assert isinstance(subscription.failure, SetupError)
    texts += [f"{topic!r} {topic.broker!r} {topic.broker} {topic.description}" for topic in (right, wrong)]
    texts += [str(refusal.value), str(subscription.failure), caplog.text]
    assert not [text for text in texts if tools.PASSWORD in text]


def test_a_password_in_the_servers_is_refused_and_not_repeated() -> None:
    with pytest.raises(SetupError) as refusal:
        Kafka(f"{tools.USER}:{tools.PASSWORD}@localhost:9092")
    assert tools.PASSWORD not in str(refusal.value)


@pytest.mark.hazard("H53")
def test_a_forked_process_is_refused(kafka_servers: str, unique: str) -> None:
    tools.create_topic(kafka_servers, unique)
    tools.produce(kafka_servers, unique, [b"one"])
    topic = source(kafka_servers, unique)
    inbox = Inbox()
    with reading(topic, inbox) as subscription:
        inbox.wait(1)
        child = os.fork()
        if child == 0:
            os._exit(_in_the_child(topic, subscription, inbox.deliveries[0]))
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        finish(inbox.deliveries[0])
        eventually(lambda: caught_up(kafka_servers, unique), what="the parent's commit")


def _in_the_child(topic: Topic, subscription: Subscription, delivery: Delivery) -> int:
    """0 when everything is refused."""
    subscription.close(1)
    if delivery.start() or subscription.connected or not isinstance(subscription.failure, SetupError):
        return 1
    for use in (topic.check, lambda: topic.subscribe("child", Inbox(), 1)):
        try:
            use()
        except SetupError as error:
            if "fork" not in str(error):
                return 2
        else:
            return 3
    return 0
