"""A consumer that answers: to each question the first answer, on real brokers and databases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from idemq import App, schema
from idemq.embedded import Embedded
from idemq.errors import SetupError
from idemq.kafka import Kafka
from idemq.message import Message
from idemq.rabbitmq import RabbitMQ
from tests import core_tools
from tests.core_tools import Shop
from tests.servers import eventually
from tests.test_relay import ANY, received, scene_of

pytestmark = [pytest.mark.situation(3), pytest.mark.pattern("result-cache")]

PROCESSED = schema.table("idemq_processed")


def counting(shop: Shop) -> tuple[Callable[..., object], list[str]]:
    """A handler whose every call has another answer."""
    calls: list[str] = []

    def answer(message: Message, session: Session) -> dict[str, object]:
        calls.append(message.id or "")
        return {"question": message.id, "call": len(calls)}

    async def answer_async(message: Message) -> dict[str, object]:
        calls.append(message.id or "")
        return {"question": message.id, "call": len(calls)}

    return answer_async if shop.asynchronous else answer, calls


@ANY
def test_a_repeat_is_sent_the_first_answer_again(shop: Shop, tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    for queue in ("questions", "answers"):
        broker.declare(queue)
    handler, calls = counting(shop)
    with scene_of(shop) as scene:
        scene.app.consumer("quotes", broker.queue("questions"), answer=True)(handler)
        for correlation in ("first", "again"):
            headers = {"reply-to": "answers", "correlation-id": correlation}
            broker.publish("questions", b"how much?", id="q1", headers=headers)
        broker.publish("questions", b"nobody waits", id="q2")
        with scene.relaying("quotes"):
            eventually(lambda: broker.depth("questions") == (0, 0) and broker.depth("answers")[0] == 2)
            eventually(lambda: scene.rows() == [])
    answers = received(broker.queue("answers"), 2)
    assert sorted(calls) == ["q1", "q2"]
    assert {each.body for each in answers} == {b'{"question":"q1","call":%d}' % (calls.index("q1") + 1)}
    assert sorted(each.headers["correlation-id"] for each in answers) == ["again", "first"]


@core_tools.on(("postgres", "psycopg"))
def test_over_rabbitmq_by_reply_to(shop: Shop, rabbitmq_url: str, unique: str) -> None:
    import amqp

    rabbit = RabbitMQ(rabbitmq_url)
    questions, answers, gone = (f"{unique}-{name}" for name in ("questions", "answers", "gone"))
    for name in (questions, answers):
        rabbit.queue(name, declare=True, arguments={"x-expires": 600_000}).check()
    handler, calls = counting(shop)
    with scene_of(shop) as scene:
        scene.app.consumer("quotes", rabbit.queue(questions), answer=True)(handler)
        host = rabbitmq_url.split("@")[1].strip("/")
        with amqp.Connection(host=host, userid="guest", password="guest") as connection:
            channel = connection.channel()
            for reply_to, correlation in ((answers, "c1"), (answers, "c2"), (gone, "c3")):
                properties = {"message_id": "q1", "reply_to": reply_to, "correlation_id": correlation}
                channel.basic_publish(amqp.Message(b"?", **properties), routing_key=questions)
        with scene.relaying("quotes"):
            found = received(rabbit.queue(answers), 2)
            eventually(lambda: scene.rows() == [])  # who waited at `gone` has left
    assert calls == ["q1"]
    assert sorted(each.properties["correlation_id"] for each in found) == ["c1", "c2"]
    assert {each.body for each in found} == {b'{"question":"q1","call":1}'}


@core_tools.on(("postgres", "psycopg"))
def test_over_kafka_by_a_header(shop: Shop, kafka_servers: str, unique: str) -> None:
    kafka = Kafka(kafka_servers)
    questions, answers = f"{unique}-questions", f"{unique}-answers"
    topics = [kafka.topic(name, group=unique, declare=True) for name in (questions, answers)]
    for topic in topics:
        topic.check()
    handler, calls = counting(shop)
    headers = {"message-id": "q1", "kafka_replyTopic": answers, "kafka_correlationId": "c1"}
    publisher = kafka.publisher()
    asked = publisher.publish([((questions,), Message(body=b"?", headers=headers, key=b"k"))] * 2, 30.0)
    publisher.close()
    assert asked == [None, None]
    with scene_of(shop) as scene:
        scene.app.consumer("quotes", topics[0], answer=True)(handler)
        with scene.relaying("quotes"):
            found = received(topics[1], 2)
    assert calls == ["q1"]
    assert [(each.headers["kafka_correlationId"], each.key, each.body) for each in found] == [
        ("c1", b"k", b'{"question":"q1","call":1}')
    ] * 2


@core_tools.on(("sqlite", "pysqlite"), ("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_an_answer_that_cannot_be_kept_undoes_the_work(shop: Shop, tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("questions")
    results: list[Any] = [object(), "x" * 70_000, "short"]
    with scene_of(shop) as scene:

        @scene.app.consumer("quotes", broker.queue("questions"), answer=True)
        def answer(message: Message) -> object:
            return results.pop(0)

        broker.publish("questions", b"?", id="q1", headers={"reply-to": ""})
        with scene.relaying("quotes"):
            eventually(lambda: broker.depth("questions") == (0, 0) and not results)
        with scene.engine.connect() as connection:
            assert connection.scalars(select(PROCESSED.c.result)).all() == [b'"short"']


def test_a_reply_to_that_there_cannot_be_is_the_askers_mistake(tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    with pytest.raises(SetupError):
        broker.to("x" * 300)
    app = App("sqlite:///shop.db")
    with pytest.raises(SetupError, match="answer="):
        app.consumer("quotes", broker.queue("q"), answer="yes")  # type: ignore[arg-type]  # that is refused
