from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from idemq.broker import Delivery, Subscription
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka import Kafka, Topic
from idemq.message import Message
from tests import kafka_tools as tools
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

    def wait(self, count: int, seconds: float = 30) -> None:
        eventually(
            lambda: len(self.deliveries) >= count, seconds, f"{count} deliveries, got {len(self.deliveries)}"
        )


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
    assert sorted(inbox.bodies[:]) == sorted({*inbox.bodies}), "nothing twice"


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
    tools.create_topic(kafka_servers, unique, **{"max.message.bytes": str(2 * size)})
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

    assert tools.members(kafka_servers, f"g-{unique}") == ("Empty", 0)
    assert tools.committed(kafka_servers, f"g-{unique}", unique) == {0: 1}
    again = Inbox(finish)
    with reading(source(kafka_servers, unique), again):
        again.wait(2)
    assert again.bodies == [b"two", b"three"]
