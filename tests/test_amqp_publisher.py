"""Publishing to RabbitMQ: nothing is reported as confirmed that the server has not confirmed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import amqp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.amqp_confirms import Open, Returned, Settled
from idemq.amqp_parcels import Parcel
from idemq.amqp_publisher import AmqpPublisher
from idemq.errors import BrokerUnavailable
from idemq.message import Message
from idemq.rabbitmq import RabbitMQ
from tests.rabbitmq_tools import OwnServer, Proxy, Server, consuming
from tests.servers import eventually

SECONDS = 60.0


@pytest.fixture
def publisher(rabbit: RabbitMQ) -> Iterator[AmqpPublisher]:
    publisher = rabbit.publisher()
    yield publisher
    publisher.close()


@pytest.fixture
def proxied(proxy: Proxy, rabbitmq_url: str) -> Iterator[AmqpPublisher]:
    publisher = RabbitMQ(f"amqp://guest:guest@127.0.0.1:{proxy.port}//").publisher()
    yield publisher
    publisher.close()


def to(queue: str) -> tuple[str, str]:
    return "", queue


def message(id: str | None, body: bytes = b"x") -> Message:
    return Message(id=id, body=body)


def taken(rabbit: RabbitMQ, queue: str, count: int) -> list[Message]:
    """The next messages of the queue, which are acknowledged."""
    with consuming(rabbit.queue(queue), prefetch=1000) as (_, got):
        deliveries = got.several(count)
        for delivery in deliveries:
            delivery.ack()
    return [delivery.message for delivery in deliveries]


@pytest.mark.hazard("H13")
def test_a_late_confirm_is_never_taken_for_that_of_the_next_message(
    proxy: Proxy, proxied: AmqpPublisher, server: Server, queue: str
) -> None:
    assert proxied.publish([(to(queue), message("0"))], SECONDS) == [None]
    proxy.hold_replies()
    with pytest.raises(BrokerUnavailable, match="1 not confirmed"):
        proxied.publish([(to(queue), message("1"))], 0.5)
    assert proxy.held.wait(SECONDS)  # the confirm of "1" is on its way
    proxy.thaw()

    for nowhere in (("missing-exchange", "k"), to("missing-queue")):
        (text,) = proxied.publish([(nowhere, message("2"))], SECONDS)
        assert text is not None
        assert "missing" in text
    assert proxied.publish([(to(queue), message("3"))], SECONDS) == [None]
    assert server.counts(queue) == (3, 0)


@pytest.mark.hazard("H13")
def test_an_unroutable_message_is_told_and_its_connection_is_not_used_again(
    proxy: Proxy, proxied: AmqpPublisher, server: Server, queue: str, unique: str
) -> None:
    exchange = f"{unique}-exchange"
    server.channel.exchange_declare(exchange, "topic", auto_delete=False)
    server.channel.queue_bind(queue, exchange, "order.*")
    batch = [((exchange, "order.created"), message("1")), ((exchange, "refund.created"), message("2"))]

    kept, lost = proxied.publish(batch, SECONDS)
    assert kept is None
    assert lost is not None
    assert "'refund.created'" in lost
    assert "NO_ROUTE" in lost
    assert server.counts(queue) == (1, 0)
    assert proxy.accepted == 1

    server.channel.queue_bind(queue, exchange, "refund.*")
    assert proxied.publish(batch, SECONDS) == [None, None]
    assert proxied.publish(batch, SECONDS) == [None, None]
    assert proxy.accepted == 2
    assert server.counts(queue) == (5, 0)
    server.channel.exchange_delete(exchange)


@pytest.mark.hazard("H13")
def test_each_of_many_is_judged_by_itself_also_when_their_ids_are_equal(
    publisher: AmqpPublisher, rabbit: RabbitMQ, queue: str
) -> None:
    batch = [
        (to(queue if n % 3 else f"{queue}-missing"), message("same" if n % 2 else None, b"%d" % n))
        for n in range(300)
    ]
    answers = publisher.publish(batch, SECONDS)

    assert [n for n, text in enumerate(answers) if text is None] == [n for n in range(300) if n % 3]
    assert [message.body for message in taken(rabbit, queue, 200)] == [b"%d" % n for n in range(300) if n % 3]


@pytest.mark.hazard("H13")
def test_returned_messages_with_large_bodies_do_not_block_the_connection(
    publisher: AmqpPublisher, server: Server, queue: str
) -> None:
    body = b"x" * 1_000_000
    batch = [(to(f"{queue}-missing"), message(str(n), body)) for n in range(40)]
    answers = publisher.publish([*batch, (to(queue), message("last", body))], SECONDS)

    assert all(answers[:40])
    assert answers[40] is None


@pytest.mark.hazard("H13")
def test_a_full_queue_that_refuses_is_told(
    publisher: AmqpPublisher, server: Server, rabbit: RabbitMQ, unique: str
) -> None:
    server.declare(unique, x_max_length=2, x_overflow="reject-publish")
    answers = publisher.publish([(to(unique), message(str(n))) for n in range(10)], SECONDS)

    kept = [n for n, text in enumerate(answers) if text is None]
    assert kept == [0, 1]
    assert all("refused" in text for text in answers if text is not None)
    assert len(taken(rabbit, unique, 2)) == 2
    assert publisher.publish([(to(unique), message("later"))], SECONDS) == [None]
    server.delete(unique)


@pytest.mark.hazard("H13")
def test_a_message_that_ends_the_channel_is_found_and_holds_up_no_other(
    publisher: AmqpPublisher, rabbit: RabbitMQ, server: Server, queue: str
) -> None:
    batch = [(to(queue), message(str(n))) for n in range(60)]
    wrong = {
        10: (("missing-1", "a"), message("a"), "no exchange 'missing-1'"),
        11: (to(queue), Message(body=b"x", id="b", properties={"expiration": "soon"}), "expiration"),
        30: (("missing-2", "a"), message("c"), "no exchange 'missing-2'"),
        50: (("missing-1", "b"), message("d"), "no exchange 'missing-1'"),
        51: (to(queue), Message(body=b"x", id="e", headers={"CC": "no list"}), "CC"),
    }
    for place, (address, bad, _) in wrong.items():
        batch[place] = address, bad
    answers = publisher.publish(batch, SECONDS)

    assert {place for place, text in enumerate(answers) if text is not None} == set(wrong)
    for place, (_, _, words) in wrong.items():
        assert words in (answers[place] or "")
    ready, _ = server.counts(queue)
    ids = [message.id for message in taken(rabbit, queue, ready)]
    assert list(dict.fromkeys(ids)) == [
        each.id for place, (_, each) in enumerate(batch) if place not in wrong
    ]
    assert publisher.publish([(to(queue), message("later"))], SECONDS) == [None]


@pytest.mark.hazard("H13")
def test_what_ends_the_channel_is_told_also_when_the_time_is_not_enough_for_the_others(
    proxy: Proxy, proxied: AmqpPublisher, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = AmqpPublisher._attempt

    def slow(self: AmqpPublisher, parcels: list[Parcel], *rest: object) -> None:
        if [parcel.id for parcel in parcels] == ["2"]:  # alone, after the one that ends the channel
            proxy.hold_replies()
        found(self, parcels, *rest)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(AmqpPublisher, "_attempt", slow)
    batch = [(to(queue), message("0")), (("missing", ""), message("1"))]
    batch += [(to(queue), message("2")), (to(queue), message("3"))]
    kept, *others = proxied.publish(batch, 5.0)

    assert kept is None
    assert "refused" in (others[0] or "")
    assert all("time was over" in (text or "") for text in others[1:])


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (Message(body=b"x", id="i" * 256), "message_id is 256 bytes"),
        (Message(body=b"x", content_type="ü" * 128), "content_type is 256 bytes"),
        (Message(body=b"x", properties={"reply_to": "r" * 256}), "reply_to is 256 bytes"),
        (Message(body=b"x", properties={"correlation_id": 7}), "correlation_id must be a text"),
        (Message(body=b"x", properties={"priority": 256}), "priority"),
        (Message(body=b"x", headers={"n" * 256: 1}), "headers"),
        (Message(body=b"x", headers={"large": "x" * 131_072}), "headers and properties fill"),
    ],
)
def test_what_does_not_fit_into_amqp_is_told_and_ends_no_connection(
    proxy: Proxy, proxied: AmqpPublisher, queue: str, bad: Message, text: str
) -> None:
    (none, answer, last) = proxied.publish(
        [(to(queue), message("1")), (to(queue), bad), (to(queue), message("2"))], SECONDS
    )
    assert (none, last) == (None, None)
    assert text in (answer or "")
    assert proxy.accepted == 1


def test_properties_headers_and_persistence_arrive(
    publisher: AmqpPublisher, rabbit: RabbitMQ, queue: str
) -> None:
    properties = {
        "correlation_id": "c",
        "reply_to": "answers",
        "type": "order",
        "priority": 3,
        "expiration": "600000",
    }
    headers = {"text": "ü", "number": 2**40, "bytes": b"\xff", "list": [1, "a"], "yes": True, "none": None}
    sent = Message(body=b"x" * 300_000, id="1", headers=headers, properties=properties)
    assert publisher.publish([(to(queue), sent)], SECONDS) == [None]

    (got,) = taken(rabbit, queue, 1)
    assert got.body == sent.body
    assert dict(got.headers) == headers
    assert dict(got.properties) == properties | {"delivery_mode": 2}


def test_a_connection_that_breaks_in_the_middle_is_a_doubt_and_the_next_batch_has_a_new_one(
    proxy: Proxy, proxied: AmqpPublisher, server: Server, queue: str
) -> None:
    assert proxied.publish([(to(queue), message("0"))], SECONDS) == [None]
    proxy.hold_replies()
    batch = [(to(queue), message(str(n), b"x" * 10_000)) for n in range(500)]
    publishing = Background(proxied, batch)
    assert proxy.held.wait(SECONDS)
    proxy.cut()
    proxy.thaw()

    assert "amqp://" in publishing.failure()
    before, _ = server.counts(queue)
    assert proxied.publish(batch, SECONDS) == [None] * 500
    assert server.counts(queue)[0] >= before + 500
    assert proxy.accepted == 2


def test_a_connection_that_broke_between_two_batches_is_replaced(
    proxy: Proxy, proxied: AmqpPublisher, server: Server, queue: str
) -> None:
    assert proxied.publish([(to(queue), message("0"))], SECONDS) == [None]
    proxy.cut()
    link = proxied._link
    assert link is not None
    eventually(lambda: not link.fit(), "the end of the connection has arrived")
    assert proxied.publish([(to(queue), message("1"))], SECONDS) == [None]
    assert server.counts(queue) == (2, 0)


def test_a_connection_that_was_idle_for_long_is_replaced(
    proxy: Proxy, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = RabbitMQ(f"amqp://guest:guest@127.0.0.1:{proxy.port}//", heartbeat=600).publisher()
    assert publisher.publish([(to(queue), message("0"))], SECONDS) == [None]
    now = time.monotonic() + 301
    with monkeypatch.context() as patched:
        patched.setattr("idemq.amqp_confirms.time.monotonic", lambda: now)
        assert publisher._link is not None
        assert not publisher._link.fit()
    publisher.close()


def test_a_server_that_does_not_answer_is_told_in_time_also_while_connecting(
    proxy: Proxy, proxied: AmqpPublisher, queue: str
) -> None:
    proxy.freeze()
    with pytest.raises(BrokerUnavailable):
        proxied.publish([(to(queue), message("1"))], 0.5)
    proxy.thaw()
    assert proxied.publish([(to(queue), message("2"))], SECONDS) == [None]


class Background:
    """A `publish` that runs beside the test."""

    def __init__(self, publisher: AmqpPublisher, batch: list[tuple[tuple[str, str], Message]]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(1)
        self._answers = self._pool.submit(publisher.publish, batch, SECONDS)

    def failure(self) -> str:
        with self._pool, pytest.raises(BrokerUnavailable) as caught:
            self._answers.result(SECONDS)
        return str(caught.value)


# What is heard, against a plain model


def parcel(place: int, routing_key: str = "k", id: str | None = "i", body: bytes = b"") -> Parcel:
    return Parcel(place, "", routing_key, id, b"", body)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.booleans()), max_size=20),
    st.sets(st.integers(0, 11)),
)
@pytest.mark.hazard("H13")
def test_an_answer_is_for_the_tags_that_it_names(
    said: list[tuple[int, bool, bool]], returned: set[int]
) -> None:
    open_, answers = Open(), dict[int, str | None]()
    for place in range(12):
        open_.add(place + 1, parcel(place, body=b"%d" % place))
    for place in returned:
        open_.hear(Returned("", "k", "i", b"%d" % place, "312 NO_ROUTE"), answers)
    assert answers == {}  # a return is final only with its ack

    kept: dict[int, bool] = {}
    for tag, multiple, positive in said:
        for each in range(1, tag + 1) if multiple else [tag]:
            kept.setdefault(each - 1, positive and each - 1 not in returned)
        open_.hear(Settled(tag, multiple, positive), answers)

    assert {place: text is None for place, text in answers.items()} == kept
    assert len(open_) == 12 - len(kept)


@pytest.mark.hazard("H13")
def test_of_messages_that_a_return_cannot_tell_apart_none_is_confirmed() -> None:
    open_, answers = Open(), dict[int, str | None]()
    for place, sent in enumerate([parcel(0), parcel(1), parcel(2, id=None), parcel(3, "other")]):
        open_.add(place + 1, sent)
    open_.hear(Returned("", "k", "i", b"", "312 NO_ROUTE"), answers)
    open_.hear(Settled(4, True, True), answers)

    assert [answers[place] is None for place in range(4)] == [False, False, True, True]


@pytest.mark.hazard("H13")
def test_a_return_of_nothing_that_was_sent_is_a_doubt_about_all() -> None:
    """Ignored, the ack that follows would pass for that of a message that was kept."""
    open_, answers = Open(), dict[int, str | None]()
    open_.add(1, parcel(0))
    with pytest.raises(amqp.UnexpectedFrame, match="was not sent"):
        open_.hear(Returned("", "k", "i", b"another body", "312 NO_ROUTE"), answers)
    assert answers == {}


# On a server of the test's own: alarms, permissions, TLS


def test_a_server_without_memory_takes_nothing_and_is_told_within_the_timeout(
    own_rabbitmq: OwnServer, unique: str
) -> None:
    server, rabbit = Server(own_rabbitmq.url), RabbitMQ(own_rabbitmq.url)
    server.declare(unique)
    publisher = rabbit.publisher()
    batch = [(to(unique), message(str(n), b"x" * 100_000)) for n in range(100)]
    assert publisher.publish(batch[:1], SECONDS) == [None]
    own_rabbitmq.ctl("set_vm_memory_high_watermark", "0")
    try:
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match=r"takes no messages now.*memory"):
                publisher.publish(batch, 2.0)
    finally:
        own_rabbitmq.ctl("set_vm_memory_high_watermark", "0.6")
    assert publisher.publish(batch, SECONDS) == [None] * 100
    publisher.close()
    assert server.counts(unique)[0] >= 101
    server.close()


def test_an_exchange_that_the_user_may_not_write_to_is_told(own_rabbitmq: OwnServer, unique: str) -> None:
    server = Server(own_rabbitmq.url)
    server.declare(unique)
    own_rabbitmq.ctl("add_user", unique, "secret")
    own_rabbitmq.ctl("set_permissions", unique, ".*", "amq.default", ".*")
    rabbit = RabbitMQ(f"amqp://{unique}:secret@127.0.0.1:{own_rabbitmq.port}//")
    publisher = rabbit.publisher()
    answers = publisher.publish(
        [(to(unique), message("1")), (("amq.fanout", ""), message("2")), (to(unique), message("3"))], SECONDS
    )
    publisher.close()

    assert answers[::2] == [None, None]
    assert "ACCESS_REFUSED" in (answers[1] or "")
    server.close()


def test_a_message_larger_than_the_server_takes_is_told(own_rabbitmq: OwnServer, unique: str) -> None:
    server = Server(own_rabbitmq.url)
    server.declare(unique)
    own_rabbitmq.ctl("eval", "application:set_env(rabbit, max_message_size, 1000000).")
    publisher = RabbitMQ(own_rabbitmq.url).publisher()
    try:
        answers = publisher.publish(
            [(to(unique), message(str(size), b"x" * size)) for size in (1, 1_000_001, 1_000_000)], SECONDS
        )
    finally:
        own_rabbitmq.ctl("eval", "application:set_env(rabbit, max_message_size, 134217728).")
        publisher.close()

    assert answers[::2] == [None, None]
    assert "larger than" in (answers[1] or "")
    server.close()


def test_a_batch_larger_than_every_buffer_passes_through_tls(own_rabbitmq: OwnServer, unique: str) -> None:
    server = Server(own_rabbitmq.url)
    server.declare(unique)
    rabbit = RabbitMQ(
        f"amqps://guest:guest@localhost:{own_rabbitmq.tls_port}//", ssl={"ca_certs": own_rabbitmq.ca_certs}
    )
    publisher = rabbit.publisher()
    batch = [(to(unique if n % 2 else "missing"), message(str(n), b"x" * 700_000)) for n in range(40)]
    answers = publisher.publish(batch, SECONDS)
    publisher.close()

    assert [text is None for text in answers] == [bool(n % 2) for n in range(40)]
    assert server.counts(unique) == (20, 0)
    server.close()


def test_a_server_that_dies_is_a_doubt_and_is_used_again_when_it_is_back(
    own_rabbitmq: OwnServer, unique: str
) -> None:
    server = Server(own_rabbitmq.url)
    server.declare(unique)
    server.close()
    publisher = RabbitMQ(own_rabbitmq.url).publisher()
    assert publisher.publish([(to(unique), message("1"))], SECONDS) == [None]
    own_rabbitmq.stop_app()
    with pytest.raises(BrokerUnavailable):
        publisher.publish([(to(unique), message("2"))], 2.0)
    own_rabbitmq.start_app()
    assert publisher.publish([(to(unique), message("3"))], SECONDS) == [None]
    publisher.close()
    assert [each.id for each in taken(RabbitMQ(own_rabbitmq.url), unique, 2)] == ["1", "3"]


def test_what_the_server_says_while_it_ends_the_connection_is_no_refusal(
    publisher: AmqpPublisher, queue: str
) -> None:
    from idemq.amqp_publisher import _is_refusal

    assert not _is_refusal(amqp.ConnectionForced("CONNECTION_FORCED - broker forced connection closure"))
    assert not _is_refusal(amqp.RecoverableConnectionError("Socket closed"))
    assert _is_refusal(amqp.NotFound("no exchange"))
    assert _is_refusal(amqp.InternalError("crashed"))
