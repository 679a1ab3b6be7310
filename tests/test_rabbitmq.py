from __future__ import annotations

import dataclasses
import gzip
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.amqp_consumer import QueueDelivery, QueueSubscription
from idemq.amqp_frames import Settled
from idemq.broker import Delivery, Source, Subscription
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka import Kafka
from idemq.kafka_session import Session
from idemq.rabbitmq import RabbitMQ
from tests.rabbitmq_tools import Collector, Proxy, Server, consuming
from tests.servers import eventually


def through(proxy: Proxy, rabbitmq_url: str, **options: Any) -> RabbitMQ:
    parts = urlsplit(rabbitmq_url)
    return RabbitMQ(f"amqp://{parts.username}:{parts.password}@127.0.0.1:{proxy.port}//", **options)


def break_the_channel(delivery: Delivery) -> None:
    """Acknowledge a tag that was never delivered: the broker answers 406 and closes the channel."""
    assert isinstance(delivery, QueueDelivery)
    dataclasses.replace(delivery, tag=1_000_000).ack()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its process would run on, and consume nothing."""

    def end(self: object, *_: object) -> None:
        raise SystemExit

    async def end_async(self: object, *_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(QueueSubscription, "_serve", end)
    monkeypatch.setattr(Session, "run", end_async)
    rabbit, topic = RabbitMQ("amqp://guest:guest@127.0.0.1:1//"), Kafka("127.0.0.1:1").topic("t", group="g")
    sources: list[Source] = [rabbit.queue("q"), topic]
    for source in sources:
        _is_told(source.subscribe("c", lambda deliveries: None, 10))


def _is_told(subscription: Subscription) -> None:
    eventually(lambda: subscription.failure is not None)
    assert "thread has ended" in str(subscription.failure)
    subscription.close(1.0)


def test_a_message_arrives_with_everything_its_publisher_said(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    server.publish(
        queue,
        b"\x00\xff body",
        headers={"tenant": "a", "depth": 3, "nested": {"x": [1, "y"]}},
        message_id="m-1",
        timestamp=1_700_000_000,
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id="c",
        priority=4,
    )

    with consuming(rabbit.queue(queue)) as (_, got):
        delivery = got.take()
        message = delivery.message
        delivery.ack()

    assert message.body == b"\x00\xff body"
    assert message.headers == {"tenant": "a", "depth": 3, "nested": {"x": [1, "y"]}}
    assert (message.id, message.content_type, message.content_encoding) == (
        "m-1",
        "application/json",
        "utf-8",
    )
    assert message.sent_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert message.properties == {"correlation_id": "c", "priority": 4}
    assert message.origin == {"broker": "rabbitmq", "queue": queue, "exchange": "", "routing_key": queue}
    assert not message.redelivered
    assert message.unreadable is None


def test_a_message_without_body_or_properties_arrives(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    server.publish(queue, b"")

    with consuming(rabbit.queue(queue)) as (_, got):
        message = got.take().message

    assert (message.body, message.id, message.sent_at, dict(message.headers)) == (b"", None, None, {})


def test_a_timestamp_in_milliseconds_is_no_time(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    server.publish(queue, b"x", timestamp=1_700_000_000_000)

    with consuming(rabbit.queue(queue)) as (_, got):
        message = got.take().message

    assert message.sent_at is None
    assert message.properties == {"timestamp": 1_700_000_000_000}


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_what_is_acked_is_gone_and_the_rest_comes_again_as_redelivered(
    rabbit: RabbitMQ, server: Server, unique: str, kind: str
) -> None:
    source = rabbit.queue(unique, declare=True, arguments={"x-queue-type": kind})
    source.check()
    for n in range(20):
        server.publish(unique, b"%d" % n)

    with consuming(source) as (_, got):
        for delivery in got.several(20):
            assert delivery.start()
            if int(delivery.message.body or b"") % 2:
                delivery.ack()
            else:
                delivery.drop()
    with consuming(source) as (_, got):
        again = got.several(10)
        for delivery in again:
            delivery.ack()

    assert sorted(int(delivery.message.body or b"") for delivery in again) == list(range(0, 20, 2))
    assert all(delivery.message.redelivered for delivery in again)
    eventually(lambda: server.counts(unique) == (0, 0))
    server.delete(unique)


def test_pause_stops_the_stream_and_what_was_delivered_can_still_be_acked(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    server.publish(queue, b"before")
    with consuming(rabbit.queue(queue)) as (subscription, got):
        delivery = got.take()
        subscription.pause()
        eventually(lambda: server.counts(queue)[1] == 0, what="consumer cancelled")
        server.publish(queue, b"after")
        assert delivery.start()
        delivery.ack()
        assert not subscription.connected

    assert got.empty
    assert not delivery.start()
    eventually(lambda: server.counts(queue) == (1, 0))


def test_what_comes_with_the_answer_to_subscribing_is_handed_over_at_once(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    for n in range(10):
        server.publish(queue, b"%d" % n)

    for _ in range(10):
        with consuming(rabbit.queue(queue)) as (_, got):
            for n in range(10):  # far sooner than the broker's next heartbeat
                assert got.take(10).message.body == b"%d" % n


@pytest.mark.parametrize("held", [slice(1, None), slice(1, None, 2)], ids=["the first", "every second"])
def test_close_sends_every_ack_to_a_quorum_queue_first(
    rabbit: RabbitMQ, server: Server, unique: str, held: slice
) -> None:
    server.declare(unique, x_queue_type="quorum")
    for n in range(100):
        server.publish(unique, b"%d" % n, delivery_mode=2)

    with consuming(rabbit.queue(unique)) as (_, got):
        acked = got.several(100)[held]
        for delivery in acked:
            delivery.ack()
    left = 100 - len(acked)
    with consuming(rabbit.queue(unique)) as (_, got):
        for delivery in got.several(left):
            delivery.ack()
    eventually(lambda: server.counts(unique) == (0, 0))
    server.delete(unique)


@given(st.data())
def test_frames_acknowledge_exactly_what_was_settled(data: st.DataObject) -> None:
    """Against the broker's rule: a frame names an outstanding tag, and may cover all below it."""
    count = data.draw(st.integers(1, 40))
    order = data.draw(st.permutations(range(1, count + 1)))
    settled, outstanding, sent = Settled(), set(range(1, count + 1)), set[int]()

    while order:
        size = data.draw(st.integers(1, len(order)))
        batch, order = order[:size], order[size:]
        sent.update(batch)
        for tag, below in settled.add(batch):
            assert tag in outstanding
            outstanding -= {each for each in outstanding if each == tag or (below and each < tag)}
        assert outstanding == set(range(1, count + 1)) - sent


def test_prefetch_bounds_what_is_held(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    for n in range(10):
        server.publish(queue, b"%d" % n)

    with consuming(rabbit.queue(queue), prefetch=3) as (_, got):
        first = got.several(3)
        assert server.counts(queue)[0] == 7
        assert got.empty
        first[1].ack()
        assert got.take().message.body == b"3"


# Hazards


@pytest.mark.hazard("H13")
def test_an_error_on_the_channel_is_answered_by_a_new_connection(
    rabbitmq_url: str, server: Server, queue: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with consuming(through(proxy, rabbitmq_url).queue(queue)) as (_, got):
        server.publish(queue, b"x")
        break_the_channel(got.take())
        got.take().ack()

    assert proxy.accepted == 2
    assert "PRECONDITION_FAILED - unknown delivery tag" in caplog.text


@pytest.mark.hazard("H8")
def test_a_late_ack_of_an_older_connection_acknowledges_nothing(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    with consuming(rabbit.queue(queue), prefetch=10) as (_, got):
        for n in range(25):
            server.publish(queue, b"held %d" % n)
            held = got.take()
            break_the_channel(held)
            again = got.take()  # the broker gives it to the new connection

            held.ack()  # late, and with a tag that the new connection has given out as well
            server.publish(queue, b"new %d" % n)
            new = got.take()

            assert isinstance(held, QueueDelivery)
            assert isinstance(again, QueueDelivery)
            assert (held.tag, held.epoch) != (again.tag, again.epoch)
            assert held.tag == again.tag == 1
            assert (again.message.body, again.message.redelivered) == (held.message.body, True)
            assert not held.start()
            assert again.start()
            # Had the late ack been sent, acknowledging `again` would break the channel once more.
            again.ack()
            new.ack()
            server.publish(queue, b"sign")
            sign = got.take()
            assert isinstance(sign, QueueDelivery)
            assert sign.epoch == again.epoch
            sign.ack()
            eventually(lambda: server.counts(queue)[0] == 0)
            break_the_channel(sign)  # so that the next round has tags from 1 again
            while sign.start():  # until the connection was replaced
                assert got.empty

    eventually(lambda: server.counts(queue) == (0, 0))


@pytest.mark.hazard("H8")
def test_late_acks_lose_no_message_when_everything_is_held_at_once(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    with consuming(rabbit.queue(queue), prefetch=50) as (_, got):
        for n in range(40):
            server.publish(queue, b"%d" % n)
        held = got.several(40)
        break_the_channel(held[0])
        again = got.several(40)
        for delivery in held:
            delivery.ack()

    with consuming(rabbit.queue(queue), prefetch=50) as (_, got):
        bodies = {delivery.message.body for delivery in got.several(40)}

    assert bodies == {b"%d" % n for n in range(40)}
    assert len(again) == 40


@pytest.mark.hazard("H9")
def test_a_deleted_queue_is_noticed_and_consumed_again_when_it_is_back(
    rabbit: RabbitMQ, server: Server, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.declare(unique)
    with caplog.at_level(logging.INFO, "idemq"), consuming(rabbit.queue(unique)) as (subscription, got):
        eventually(lambda: subscription.connected)
        server.publish(unique, b"first")
        first = got.take()

        server.delete(unique)
        eventually(lambda: not subscription.connected)
        eventually(lambda: "does not exist" in caplog.text)
        assert not first.start()

        server.declare(unique)
        server.publish(unique, b"second")
        assert got.take().message.body == b"second"
        assert subscription.connected
        assert subscription.failure is None
    server.delete(unique)

    assert "the broker cancelled the consumer" in caplog.text
    assert all(record.exc_info is None for record in caplog.records)
    assert all(unique in record.getMessage() for record in caplog.records)


@pytest.mark.hazard("H9")
def test_a_queue_that_idemq_declares_comes_back_by_itself(
    rabbit: RabbitMQ, server: Server, unique: str
) -> None:
    with consuming(rabbit.queue(unique, declare=True)) as (subscription, got):
        eventually(lambda: subscription.connected)
        server.delete(unique)
        eventually(lambda: not subscription.connected)
        eventually(lambda: subscription.connected)
        server.publish(unique, b"x")
        assert got.take().message.body == b"x"
    server.delete(unique)


@pytest.mark.hazard("H9")
def test_a_silent_broker_is_noticed_by_its_missing_heartbeats(
    rabbitmq_url: str, server: Server, queue: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    source = through(proxy, rabbitmq_url, heartbeat=1, connect_timeout=1).queue(queue)
    with consuming(source) as (subscription, got):
        eventually(lambda: subscription.connected)
        proxy.freeze()
        eventually(lambda: not subscription.connected)
        eventually(lambda: "heartbeats missed" in caplog.text)
        proxy.thaw()
        server.publish(queue, b"x")
        assert got.take().message.body == b"x"


@pytest.mark.hazard("H9")
def test_a_cut_connection_is_rebuilt_with_one_log_line_an_attempt(
    rabbitmq_url: str, server: Server, queue: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with consuming(through(proxy, rabbitmq_url).queue(queue)) as (subscription, got):
        eventually(lambda: subscription.connected)
        server.publish(queue, b"x")
        before = got.take()
        proxy.cut()
        after = got.take()
        assert after.message.redelivered
        assert not before.start()
        after.ack()
        before.ack()

    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings
    assert all(re.search(r"trying again in \d", record.getMessage()) for record in warnings)
    assert all(record.exc_info is None for record in warnings)
    eventually(lambda: server.counts(queue) == (0, 0))


@pytest.mark.hazard("H9")
def test_an_unexpected_error_costs_a_connection_and_nothing_else(
    rabbit: RabbitMQ, server: Server, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.publish(queue, b"x")
    collector = Collector()
    faults = [ZeroDivisionError("a mistake in the program")]

    def deliver(deliveries: Sequence[Delivery]) -> None:
        if faults:
            raise faults.pop()
        collector(deliveries)

    subscription = rabbit.queue(queue).subscribe("test", deliver, 10)
    delivery = collector.take()
    delivery.ack()
    subscription.close(10)

    assert delivery.message.redelivered
    assert "ZeroDivisionError: a mistake in the program" in caplog.text  # with its traceback
    eventually(lambda: server.counts(queue) == (0, 0))


@pytest.mark.hazard("H17")
def test_deliveries_held_for_three_heartbeats_stay_ours(
    rabbitmq_url: str, server: Server, queue: str
) -> None:
    with consuming(RabbitMQ(rabbitmq_url, heartbeat=1).queue(queue)) as (subscription, got):
        server.publish(queue, b"slow")
        delivery = got.take()
        threading.Event().wait(3.5)  # the handler blocks
        assert subscription.connected
        assert delivery.start()
        assert got.empty
        delivery.ack()

    eventually(lambda: server.counts(queue) == (0, 0))


@pytest.mark.hazard("H18")
def test_sixteen_threads_ack_without_a_channel_error(
    rabbit: RabbitMQ, server: Server, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    count, threads = 4800, 16
    seen: list[bytes | None] = []
    epochs: set[int] = set()

    with consuming(rabbit.queue(queue), prefetch=500) as (_, got):

        def publish() -> None:
            for n in range(count):
                server.publish(queue, b"%d" % n)

        def handle() -> None:
            for _ in range(count // threads):
                delivery = got.take()
                assert isinstance(delivery, QueueDelivery)
                epochs.add(delivery.epoch)
                seen.append(delivery.message.body)
                delivery.ack()

        workers = [threading.Thread(target=handle) for _ in range(threads)]
        workers.append(threading.Thread(target=publish))
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()

    assert sorted(int(body or b"") for body in seen) == list(range(count))
    assert len(epochs) == 1
    eventually(lambda: server.counts(queue) == (0, 0))
    assert not caplog.records


@pytest.mark.hazard("H24")
def test_messages_with_undecodable_properties_are_delivered_once_as_unreadable(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    poison: list[dict[str, Any]] = [
        {"message_id": b"\xff\xfe not utf-8"},
        {"correlation_id": b"\xc3("},
        {"content_type": b"\x80"},
    ]
    for n in range(50):
        server.publish(queue, b"%d" % n, message_id=f"m{n}")
    for properties in poison:
        server.publish(queue, b"poison", **properties)
    for n in range(50, 100):
        server.publish(queue, b"%d" % n, message_id=f"m{n}")

    with consuming(rabbit.queue(queue), prefetch=200) as (_, got):
        deliveries = got.several(103)
        for delivery in deliveries:
            delivery.ack()

    unreadable = [delivery.message for delivery in deliveries if delivery.message.unreadable]
    readable = [delivery.message for delivery in deliveries if not delivery.message.unreadable]
    assert {message.id for message in readable} == {f"m{n}" for n in range(100)}
    assert [message.body for message in unreadable] == [b"poison"] * 3
    assert b"\xff\xfe not utf-8" in unreadable[0].properties["raw"]
    assert all(message.id is None for message in unreadable)
    eventually(lambda: server.counts(queue) == (0, 0))


@pytest.mark.hazard("H24")
def test_a_routing_key_of_any_bytes_stops_nothing(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    exchange = queue + "x"
    server.channel.exchange_declare(exchange, "fanout", auto_delete=False)
    server.channel.queue_bind(queue, exchange)
    server.channel.basic_publish(amqp.Message(b"x"), exchange=exchange, routing_key=b"\xff")
    server.channel.exchange_delete(exchange)

    with consuming(rabbit.queue(queue)) as (_, got):
        delivery = got.take()
        delivery.ack()

    assert delivery.message.origin["routing_key"] == "\\xff"
    assert delivery.message.unreadable is None


def _in_child(subscription: QueueSubscription, delivery: Delivery, source: Any, answers: Any) -> None:
    def refused(call: Any) -> bool:
        try:
            call()
        except SetupError as error:
            return "fork" in str(error)
        return False

    delivery.ack()
    answers.put(
        [
            refused(source.check),
            refused(lambda: source.subscribe("child", Collector(), 1)),
            refused(delivery.start),
            refused(subscription.pause),
            refused(lambda: subscription.close(1)),
            not subscription.connected,
        ]
    )


@pytest.mark.hazard("H53")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # forking beside threads is what is tested
def test_a_forked_child_is_refused_and_does_not_disturb_the_parent(
    rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    source = rabbit.queue(queue)
    with consuming(source) as (subscription, got):
        server.publish(queue, b"x")
        delivery = got.take()
        fork = multiprocessing.get_context("fork")
        answers = fork.Queue()
        child = fork.Process(target=_in_child, args=(subscription, delivery, source, answers))
        child.start()
        assert answers.get(timeout=20) == [True] * 6
        child.join()

        assert delivery.start()
        assert subscription.connected
        server.publish(queue, b"y")
        assert got.take().message.body == b"y"
    eventually(lambda: server.counts(queue) == (2, 0))  # the child's ack reached nobody


@pytest.mark.hazard("H59")
def test_a_message_of_20_megabytes_passes(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    body = os.urandom(1_000_000) * 20
    server.publish(queue, body)
    server.publish(queue, b"small")

    with consuming(rabbit.queue(queue)) as (_, got):
        large, small = got.several(2)
        large.ack()
        small.ack()

    assert large.message.body == body
    assert small.message.body == b"small"


@pytest.mark.hazard("H60")
@pytest.mark.parametrize("prefetch", [0, -1, 1001, None, 1.5, True])
def test_a_prefetch_outside_1_to_1000_is_refused(rabbit: RabbitMQ, prefetch: Any) -> None:
    with pytest.raises(SetupError, match=r"'receipts'.*prefetch must be from 1 to 1000"):
        rabbit.queue("q").subscribe("receipts", Collector(), prefetch)


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.hazard("S1")
def test_a_pickle_arrives_as_bytes_and_is_never_opened(
    rabbit: RabbitMQ, server: Server, queue: str, tmp_path: Any
) -> None:
    body = pickle.dumps(_Bomb(str(tmp_path / "owned")))
    server.publish(queue, body, content_type="application/x-python-serialize", content_encoding="binary")

    with consuming(rabbit.queue(queue)) as (_, got):
        assert got.take().message.body == body

    assert not (tmp_path / "owned").exists()


@pytest.mark.hazard("S2")
def test_a_compressed_body_arrives_as_it_was_sent(rabbit: RabbitMQ, server: Server, queue: str) -> None:
    body = gzip.compress(bytes(200_000_000), 1)
    headers = {"compression": "application/x-gzip"}
    server.publish(queue, body, headers=headers, content_type="application/json", content_encoding="utf-8")

    with consuming(rabbit.queue(queue)) as (_, got):
        message = got.take().message

    assert message.body == body
    assert message.headers == headers


@pytest.mark.hazard("S7")
def test_the_password_is_in_no_text(rabbitmq_url: str, unique: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    secret = "hunter2secret"
    place = rabbitmq_url.partition("@")[2]
    wrong = RabbitMQ(f"amqp://nobody:{secret}@{place}")
    source = wrong.queue(unique)

    with pytest.raises(SetupError, match="user 'nobody'") as refused:
        source.check()
    with consuming(source):
        eventually(lambda: "refused the user" in caplog.text)
    with pytest.raises(SetupError) as unreadable:
        RabbitMQ("amqp://user:hunter2/secret@localhost")
    texts = [caplog.text, repr(wrong), str(source), repr(source), source.description, repr(wrong._addresses)]
    texts += [repr(refused.value), str(refused.value), repr(unreadable.value)]

    assert not [text for text in texts if secret in text or "hunter2" in text]
    assert "nobody" in source.description


# Set-up


def test_a_missing_queue_is_named_with_its_remedy(rabbit: RabbitMQ, unique: str) -> None:
    with pytest.raises(SetupError, match=rf"queue '{unique}' on amqp://.*does not exist.*declare=True"):
        rabbit.queue(unique).check()


def test_a_queue_is_declared_durable_with_its_arguments(
    rabbit: RabbitMQ, server: Server, unique: str
) -> None:
    rabbit.queue(unique, declare=True, arguments={"x-max-priority": 5}).check()

    server.declare(unique, durable=True, x_max_priority=5)  # equal, else the broker refuses
    rabbit.queue(unique, arguments={"x-max-priority": 5}).check()
    with pytest.raises(SetupError, match=r"not as declare and arguments say: .*x-max-priority"):
        rabbit.queue(unique, arguments={"x-max-priority": 6}).check()
    server.delete(unique)


def test_a_missing_virtual_host_is_named(rabbitmq_url: str, unique: str) -> None:
    parts = urlsplit(rabbitmq_url)
    url = f"amqp://{parts.username}:{parts.password}@{parts.hostname}:{parts.port}/{unique}"
    with pytest.raises(SetupError, match=rf"virtual host '{unique}' does not exist"):
        RabbitMQ(url).queue("q").check()


def test_an_unreachable_server_is_unavailable() -> None:
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
        RabbitMQ("amqp://127.0.0.1:1").queue("q").check()


def test_the_first_server_that_answers_is_used(rabbitmq_url: str, server: Server, queue: str) -> None:
    source = RabbitMQ(f"amqp://127.0.0.1:1;{rabbitmq_url}").queue(queue)

    source.check()
    server.publish(queue, b"x")
    with consuming(source) as (_, got):
        assert got.take().message.body == b"x"


def test_close_ends_in_time_while_the_server_is_unreachable() -> None:
    subscription = RabbitMQ("amqp://127.0.0.1:1").queue("q").subscribe("test", Collector(), 1)
    started = time.monotonic()
    subscription.close(10)
    assert time.monotonic() - started < 8
    assert not subscription.connected


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        (None, {}, "url must be a text"),
        ("", {}, "must begin with amqp"),
        ("redis://localhost", {}, "must begin with amqp"),
        ("amqp://a;localhost", {}, "must begin with amqp"),
        ("amqp://localhost:port", {}, "url cannot be read"),
        ("amqp://localhost?heart=1", {}, "unknown option 'heart'"),
        ("amqp://localhost?heartbeat=0", {}, "heartbeat must be"),
        ("amqp://localhost?heartbeat=soon", {}, "heartbeat in the url must be a number"),
        ("amqp://localhost", {"heartbeat": 0}, "heartbeat must be"),
        ("amqp://localhost", {"heartbeat": True}, "heartbeat must be"),
        ("amqp://localhost", {"connect_timeout": 0}, "connect_timeout must be"),
        ("amqp://localhost", {"login_method": "GUESS"}, "login_method must be one of"),
        ("amqp://localhost", {"name": ""}, "name must be"),
        ("amqps://localhost", {"ssl": False}, "contradicts"),
        ("amqps://localhost", {"ssl": {"ca": "x"}}, "unknown option 'ca'"),
        ("amqps://localhost", {"ssl": {"ca_certs": "/no/such/file"}}, "ca_certs names no file"),
    ],
)
def test_a_bad_option_is_named(url: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        RabbitMQ(url, **options)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("", {}, "name must be"),
        ("x" * 256, {}, "name must be"),
        ("q", {"arguments": {"x": object()}}, "arguments must map"),
        ("q", {"arguments": {1: "x"}}, "arguments must map"),
    ],
)
def test_a_bad_queue_option_is_named(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        RabbitMQ("amqp://localhost").queue(name, **options)


def test_the_url_says_everything_that_it_may_say() -> None:
    rabbit = RabbitMQ("amqps://a%40b:p%2Fw@one:99/v%2Fh?heartbeat=5;amqps://two?connect_timeout=2.5")
    one, two = rabbit._addresses

    assert (one.host, one.port, one.user, one.password, one.vhost, one.heartbeat) == (
        "one",
        99,
        "a@b",
        "p/w",
        "v/h",
        5,
    )
    assert (two.host, two.port, two.user, two.vhost, two.connect_timeout) == ("two", 5671, "guest", "/", 2.5)
    assert one.tls == {"server_hostname": "one"}
    assert repr(rabbit) == "RabbitMQ('amqps://a%40b@one:99/v%2Fh;amqps://guest@two:5671/', name='rabbitmq')"


def test_without_kombu_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["kombu"] = None
from idemq.errors import SetupError
try:
    import idemq.rabbitmq
except SetupError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "idemq[rabbitmq]"' in said
