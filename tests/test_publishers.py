"""What every publisher does, on each broker; and what is Kafka's own_kafka."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from idemq import broker as api
from idemq.broker import Destination
from idemq.embedded import Embedded
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka import Kafka
from idemq.kafka_parcels import Record
from idemq.kafka_publisher import KafkaPublisher
from idemq.message import Message, message_id
from idemq.rabbitmq import RabbitMQ
from tests import kafka_tools as tools
from tests.contract.brokers import Broker, EmbeddedBroker, KafkaBroker, RabbitBroker
from tests.contract.inbox import ack, consuming, ids

SECONDS = 60.0
SENT_AT = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.fixture(params=["embedded", "rabbitmq", "kafka"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Broker]:
    """A fresh queue on each broker."""
    made: Broker
    match request.param:
        case "embedded":
            made = EmbeddedBroker(str(tmp_path / "broker.db"), unique)
        case "kafka":
            made = KafkaBroker(request.getfixturevalue("kafka_servers"), unique)
        case _:
            made = RabbitBroker(request.getfixturevalue("rabbitmq_url"), unique)
    made.create()
    yield made
    made.remove()


def declared(broker: Broker) -> Embedded | RabbitMQ | Kafka:
    """The broker, as a user of idemq declares it."""
    match broker:
        case EmbeddedBroker():
            return Embedded(broker.address)
        case RabbitBroker():
            return RabbitMQ(broker.address)
        case KafkaBroker():
            return Kafka(broker.address)
    raise AssertionError(broker)


@contextmanager
def publishing(broker: api.Broker) -> Iterator[api.Publisher]:
    publisher = broker.publisher()
    try:
        yield publisher
    finally:
        publisher.close()


def some(count: int, **values: Any) -> list[Message]:
    return [Message(body=b"%d" % n, id=f"id-{n}", **values) for n in range(count)]


def test_what_is_confirmed_is_there_with_all_that_it_carries(broker: Broker) -> None:
    given = Message(
        body=b"\x00\xff body",
        id="id-ü",
        headers={"tenant": "blue", "empty": ""},
        content_type="text/plain",
        content_encoding="latin-1",
        sent_at=SENT_AT,
    )
    target = declared(broker)
    with publishing(target) as publisher:
        assert publisher.publish([(target.to(broker.name).address, given)], SECONDS) == [None]

    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        got = delivery.message
        ack([delivery])
    assert message_id(got, None) == "id-ü"
    assert {name: got.headers[name] for name in given.headers} == given.headers
    assert (got.body, got.content_type, got.content_encoding, got.sent_at) == (
        given.body, given.content_type, given.content_encoding, given.sent_at,
    )  # fmt: skip


def test_an_empty_message_with_nothing_but_a_body_passes(broker: Broker) -> None:
    target = declared(broker)
    with publishing(target) as publisher:
        address = target.to(broker.name).address
        assert publisher.publish([(address, Message(body=b""))], SECONDS) == [None]
        assert publisher.publish([], SECONDS) == []

    with consuming(broker.source()) as (inbox, _):
        (delivery,) = inbox.take()
        assert delivery.message.body == b""


def test_a_batch_keeps_its_order_and_so_does_the_next(broker: Broker) -> None:
    target = declared(broker)
    batch = [(target.to(broker.name).address, message) for message in some(500, key=b"one")]
    with publishing(target) as publisher:
        for start in (0, 250):
            assert publisher.publish(batch[start : start + 250], SECONDS) == [None] * 250

    with consuming(broker.source(), prefetch=500) as (inbox, _):
        taken = inbox.take(500)
        assert ids(taken) == [f"id-{n}" for n in range(500)]
        assert inbox.empty


def test_a_message_to_nowhere_is_told_and_disturbs_no_other(broker: Broker) -> None:
    target = declared(broker)
    here, nowhere = target.to(broker.name).address, target.to(f"{broker.name}-missing").address
    with publishing(target) as publisher:
        first, missing, last = publisher.publish(
            [(here, some(1)[0]), (nowhere, Message(body=b"x", id="id-0")), (here, some(2)[1])], SECONDS
        )
        again = publisher.publish([(here, some(3)[2])], SECONDS)

    assert (first, last, again) == (None, None, [None])
    assert missing is not None
    assert f"{broker.name}-missing" in missing
    with pytest.raises(SetupError):  # it was not made by the way
        broker.missing().check()
    assert broker.left() == 3


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (Message(body=None), "body|tombstone"),
        (Message(body=b"x", headers={"a": object()}), "header|keep"),
        (Message(body=b"x", sent_at=datetime(2024, 1, 1)), "zone|offset"),
        (Message(body=b"x", properties={"cluster": "c"}), "property 'cluster'"),
    ],
    ids=["no body", "header", "naive time", "property"],
)
def test_a_message_that_it_cannot_carry_is_told_and_disturbs_no_other(
    broker: Broker, bad: Message, text: str
) -> None:
    target = declared(broker)
    address = target.to(broker.name).address
    with publishing(target) as publisher:
        before, refused, wrong, after = publisher.publish(
            [
                (address, some(1)[0]),
                (address, bad),
                (("a", "b", "c"), Message(body=b"x")),
                (address, some(2)[1]),
            ],
            SECONDS,
        )

    assert (before, after) == (None, None)
    assert refused is not None
    assert any(word in refused for word in text.split("|"))
    assert wrong is not None
    with consuming(broker.source()) as (inbox, _):
        assert ids(inbox.take(2)) == ["id-0", "id-1"]
        assert inbox.empty


def test_a_closed_publisher_connects_again(broker: Broker) -> None:
    target = declared(broker)
    publisher = target.publisher()
    for message in some(2):
        assert publisher.publish([(target.to(broker.name).address, message)], SECONDS) == [None]
        publisher.close()
        publisher.close()
    assert broker.left() == 2


@pytest.mark.parametrize(
    "broker",
    [
        RabbitMQ("amqp://guest:verysecret@127.0.0.1:1//"),
        RabbitMQ("amqp://guest:verysecret@127.0.0.1:1//;amqp://guest:verysecret@127.0.0.1:2//"),
        Kafka("127.0.0.1:1"),
    ],
    ids=["rabbitmq", "rabbitmq cluster", "kafka"],
)
def test_an_unreachable_broker_is_told(broker: RabbitMQ | Kafka) -> None:
    with publishing(broker) as publisher, pytest.raises(BrokerUnavailable) as caught:
        publisher.publish([(broker.to("q").address, some(1)[0])], SECONDS)
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_refused_password_is_told_as_a_broker_that_is_away(rabbitmq_url: str) -> None:
    rabbit = RabbitMQ(rabbitmq_url.replace("guest:guest", "guest:wrong"))
    with publishing(rabbit) as publisher, pytest.raises(BrokerUnavailable, match="check user and password"):
        publisher.publish([(rabbit.to("q").address, some(1)[0])], SECONDS)


def test_a_destination_is_plain_data(tmp_path: Path) -> None:
    assert RabbitMQ("amqp://localhost").to("q") == Destination("rabbitmq", ("", "q"))
    assert RabbitMQ("amqp://localhost", name="r").to(exchange="e", routing_key="k") == Destination(
        "r", ("e", "k")
    )
    assert RabbitMQ("amqp://localhost").to(exchange="fanout") == Destination("rabbitmq", ("fanout", ""))
    assert Kafka("localhost").to("t") == Destination("kafka", ("t",))
    destination = Embedded(tmp_path / "x.db").to("q")
    assert destination == Destination("embedded", ("q",))
    assert pickle.loads(pickle.dumps(destination)) == destination


@pytest.mark.parametrize(
    "declare",
    [
        lambda: RabbitMQ("amqp://localhost").to(),
        lambda: RabbitMQ("amqp://localhost").to(""),
        lambda: RabbitMQ("amqp://localhost").to("q", exchange="e"),
        lambda: RabbitMQ("amqp://localhost").to("q", routing_key="k"),
        lambda: RabbitMQ("amqp://localhost").to(routing_key="k"),
        lambda: RabbitMQ("amqp://localhost").to("ü" * 128),
        lambda: RabbitMQ("amqp://localhost").to(exchange="e", routing_key="k" * 256),
        lambda: RabbitMQ("amqp://localhost").to(b"q"),  # type: ignore[arg-type]  # what is tested
        lambda: Kafka("localhost").to(""),
        lambda: Kafka("localhost").to(".."),
        lambda: Kafka("localhost").to("a b"),
        lambda: Kafka("localhost").to("x" * 250),
        lambda: Embedded("x.db").to(""),
        lambda: Embedded("x.db").to("x" * 256),
    ],
)
def test_a_wrong_destination_is_refused_at_once(declare: Callable[[], Destination]) -> None:
    with pytest.raises(SetupError):
        declare()


def _in_child(publisher: api.Publisher, address: tuple[str, ...], answers: Any) -> None:
    for call in (lambda: publisher.publish([(address, some(1)[0])], SECONDS), publisher.close):
        try:
            answers.put(str(call()))
        except SetupError as error:
            answers.put("refused" if "fork" in str(error) else str(error))


@pytest.mark.hazard("H53")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # forking beside threads is what is tested
def test_a_forked_child_is_refused_and_does_not_disturb_the_parent(broker: Broker) -> None:
    target = declared(broker)
    address = target.to(broker.name).address
    with publishing(target) as publisher:
        assert publisher.publish([(address, some(1)[0])], SECONDS) == [None]
        fork = multiprocessing.get_context("fork")
        answers = fork.Queue()
        child = fork.Process(target=_in_child, args=(publisher, address, answers))
        child.start()
        assert [answers.get(timeout=SECONDS) for _ in range(2)] == ["refused"] * 2
        child.join()
        assert publisher.publish([(address, some(2)[1])], SECONDS) == [None]
    assert broker.left() == 2


# Embedded


def test_the_embedded_broker_waits_for_another_writer_no_longer_than_the_timeout(tmp_path: Path) -> None:
    import sqlite3

    embedded = Embedded(tmp_path / "broker.db")
    embedded.declare("q")
    other = sqlite3.connect(embedded.path, isolation_level=None)
    with publishing(embedded) as publisher:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(BrokerUnavailable, match="locked"):
            publisher.publish([(("q",), some(1)[0])], 0.2)
        other.execute("ROLLBACK")
        assert publisher.publish([(("q",), some(1)[0])], SECONDS) == [None]
    other.close()
    assert embedded.depth("q") == (1, 0)
    embedded.close()


def test_an_embedded_broker_whose_file_is_missing_is_told(tmp_path: Path) -> None:
    embedded = Embedded(tmp_path / "broker.db")
    with publishing(embedded) as publisher:
        (text,) = publisher.publish([(("q",), some(1)[0])], SECONDS)
        assert text is not None
        assert "declare" in text
        embedded.declare("q")
        assert publisher.publish([(("q",), some(1)[0])], SECONDS) == [None]


# Kafka


def test_a_kafka_record_has_key_headers_of_bytes_and_milliseconds_and_a_tombstone_no_value(
    kafka_servers: str, unique: str
) -> None:
    kafka, topic = Kafka(kafka_servers), KafkaBroker(kafka_servers, unique)
    topic.create()
    sent_at = SENT_AT + timedelta(milliseconds=123)
    full = Message(body=b"v", id="1", key=b"k", headers={"raw": b"\xff", "none": None}, sent_at=sent_at)
    tombstone = Message(body=None, id="2", key=b"k", headers={"message-id": "2"})
    with publishing(kafka) as publisher:
        to = kafka.to(unique).address
        assert publisher.publish([(to, full), (to, tombstone)], SECONDS) == [None, None]

    with consuming(topic.source()) as (inbox, _):
        first, second = (delivery.message for delivery in inbox.take(2))
    assert (first.body, first.key, first.sent_at) == (b"v", b"k", sent_at)
    assert dict(first.headers) == {"raw": b"\xff", "none": None, "message-id": "1"}
    assert (second.body, second.key) == (None, b"k")
    assert message_id(second, None) == "2"
    topic.remove()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message(body=b"x", id="1", headers={"message-id": "2"}), "'message-id' is '2'"),
        (Message(body=b"x", content_type="a", headers={"content-type": b"b"}), "'content-type'"),
        (Message(body=b"x", headers={"n": 1}), "text or bytes, not int"),
        (Message(body=b"x", headers={"n": "\ud800"}), "UTF-8"),
        (Message(body=b"x", sent_at=datetime(1960, 1, 1, tzinfo=UTC)), "1970"),
    ],
)
def test_a_kafka_header_that_would_be_ambiguous_or_no_text_is_told(message: Message, text: str) -> None:
    with publishing(Kafka("127.0.0.1:1")) as publisher:
        (answer,) = publisher.publish([(("t",), message)], SECONDS)
    assert answer is not None
    assert text in answer


def test_a_record_that_is_too_large_is_told_and_the_others_keep_their_order(
    kafka_servers: str, unique: str
) -> None:
    kafka, topic = Kafka(kafka_servers), KafkaBroker(kafka_servers, unique)
    tools.create_topic(kafka_servers, unique, configs={"max.message.bytes": "40000"})
    batch = some(60, key=b"k")
    batch[20] = Message(body=b"x" * 50_000, id="large", key=b"k")
    batch[40] = Message(body=b"x" * 70_000_000, id="huge", key=b"k")
    with publishing(kafka) as publisher:
        answers = publisher.publish([(kafka.to(unique).address, message) for message in batch], SECONDS)
        texts = {place: text for place, text in enumerate(answers) if text is not None}
        assert set(texts) == {20, 40}
        assert all("too large" in text.lower().replace("_", " ") for text in texts.values())
        assert publisher.publish([(kafka.to(unique).address, some(1)[0])], SECONDS) == [None]

    with consuming(topic.source()) as (inbox, _):
        firsts = list(dict.fromkeys(ids(inbox.take(59))))
    assert firsts == [message.id for message in batch if message.id not in ("large", "huge")]
    topic.remove()


@pytest.mark.parametrize("place", [0, 7, 250, 299])
def test_a_record_that_is_refused_takes_none_with_it_and_changes_no_order(
    kafka_servers: str, unique: str, place: int
) -> None:
    kafka = Kafka(kafka_servers)
    tools.create_topic(kafka_servers, unique, configs={"cleanup.policy": "compact"})
    batch = [Message(body=b"x" * 1000, id=f"id-{n}", key=b"k") for n in range(300)]  # several requests
    batch[place] = Message(body=b"x", id="no key")
    with publishing(kafka) as publisher:
        answers = publisher.publish([(kafka.to(unique).address, message) for message in batch], SECONDS)
        texts = [(n, text) for n, text in enumerate(answers) if text is not None]
        assert [n for n, _ in texts] == [place]

    with consuming(KafkaBroker(kafka_servers, unique).source(), prefetch=500) as (inbox, _):
        assert ids(inbox.take(299)) == [f"id-{n}" for n in range(300) if n != place]
        assert inbox.empty
    tools.delete_topic(kafka_servers, unique)


def test_a_refused_record_is_told_also_when_the_time_is_not_enough_for_the_others(
    kafka_servers: str, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = Kafka(kafka_servers)
    tools.create_topic(kafka_servers, unique, configs={"cleanup.policy": "compact"})
    found = KafkaPublisher._attempt

    async def slow(self: KafkaPublisher, records: list[Record], *rest: Any) -> dict[int, str]:
        if [record.place for record in records] == [2]:  # alone, after the one that is refused
            await asyncio.sleep(5.0)
        return await found(self, records, *rest)

    monkeypatch.setattr(KafkaPublisher, "_attempt", slow)
    batch = some(4, key=b"k")
    batch[1] = Message(body=b"x", id="no key")
    with publishing(kafka) as publisher:
        publisher.publish([(kafka.to(unique).address, some(1, key=b"k")[0])], SECONDS)
        kept, *others = publisher.publish([(kafka.to(unique).address, message) for message in batch], 5.0)

    assert kept is None
    assert "refused" in (others[0] or "")
    assert all("time was over" in (text or "") for text in others[1:])
    tools.delete_topic(kafka_servers, unique)


def test_a_topic_that_was_deleted_is_told_and_not_made_again(kafka_servers: str, unique: str) -> None:
    kafka = Kafka(kafka_servers)
    tools.create_topic(kafka_servers, unique)
    with publishing(kafka) as publisher:
        assert publisher.publish([(kafka.to(unique).address, some(1)[0])], SECONDS) == [None]
        tools.delete_topic(kafka_servers, unique)
        (answer,) = publisher.publish([(kafka.to(unique).address, some(1)[0])], SECONDS)

    assert answer is not None
    assert "create it" in answer
    assert unique not in tools.topics(kafka_servers)


def test_a_kafka_that_does_not_answer_is_told_and_used_again_when_it_does(
    own_kafka: tools.Broker, unique: str
) -> None:
    kafka, topic = Kafka(own_kafka.servers), KafkaBroker(own_kafka.servers, unique)
    topic.create()
    container = own_kafka.container.get_wrapped_container()
    to = kafka.to(unique).address
    with publishing(kafka) as publisher:
        assert publisher.publish([(to, some(1)[0])], SECONDS) == [None]
        container.pause()
        try:
            for _ in range(2):  # on the connection that was, and on a new one
                with pytest.raises(BrokerUnavailable, match="in time"):
                    publisher.publish([(to, some(2)[1])], 1.0)
                assert isinstance(publisher, KafkaPublisher)
                assert publisher._producer is None  # it would send what it holds later
        finally:
            container.unpause()
        assert publisher.publish([(to, some(3)[2])], SECONDS) == [None]

    with consuming(topic.source()) as (inbox, _):
        assert ids(inbox.take(1)) == ["id-0"]
        rest = ids(inbox.take(1))
        while "id-2" not in rest:  # what was sent before the pause may have arrived
            rest += ids(inbox.take(1))
    assert rest in (["id-2"], ["id-1", "id-2"])
