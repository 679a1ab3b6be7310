"""What could wedge a relay, or have it take the one for the other: long queues, odd functions, odd askers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, update
from sqlalchemy.exc import DBAPIError
from tenacity import Retrying, stop_after_delay, wait_fixed

from idemq import App, Effects, NotSent, Outbox
from idemq.broker import Destination
from idemq.drivers import begin, is_contention
from idemq.embedded import Embedded
from idemq.errors import BrokerUnavailable, SetupError
from idemq.kafka import Kafka
from idemq.message import Message
from idemq.outgoing import IN_DOUBT, Messages
from idemq.rabbitmq import RabbitMQ
from idemq.replies import Replies
from idemq.status import leaving
from tests import core_tools
from tests.core_tools import Shop
from tests.servers import eventually
from tests.test_outgoing import (
    ERROR,
    NOBODY,
    A,
    B,
    Process,
    begun,
    bodies,
    engine,
    pick,
    plan,
    publish,
)  # fmt: skip
from tests.test_relay import SYNC, TABLE, Provider, plan_sms, received, scene_of

__all__ = ["engine"]


@SYNC
def test_a_refused_message_with_many_behind_it_is_tried_again(engine: Engine) -> None:
    publish(engine, *(f"k{number}" for number in range(6)), key="k")
    messages, (first, *rest) = Messages("rabbit", A, None), pick(engine)
    with engine.connect() as connection:
        messages.unsent(connection, [(first, "no such queue", 0.3), *((row, None, 0.0) for row in rest)])
    # The others have been due for longer, and are more than one pick takes.
    picked: list[list[str]] = []

    def look() -> bool:
        picked.append(bodies(pick(engine, B, count=2)))
        return bool(picked[-1])

    eventually(look)
    assert picked[-1] == ["k0", "k1"]


@SYNC
def test_a_pick_takes_no_more_than_fits_in_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idemq.outgoing.MAX_BYTES", 2500)
    publish(engine, *(str(number) * 1000 for number in range(5)), key="k")
    publish(engine, "5" * 2000)
    sizes = [[body[0] for body in bodies(pick(engine))] for _ in range(3)]
    assert sizes == [["0", "1"], ["5"], []]


@core_tools.on(("postgres", "psycopg"), ("mariadb", "pymysql"))
def test_a_relay_waits_for_nobody_who_plans_or_decides_and_takes_his_time(engine: Engine) -> None:
    key = plan(engine)
    process, other = Process(engine, NOBODY), Process(engine, NOBODY, B)
    row = process.one()
    with begun(engine) as webhook, begun(engine) as slow:
        for broker in ("rabbit", "zebra"):
            Outbox(slow).publish(Destination(broker, ("", "q")), b"1", key="k")
        for broker in ("a", "rabbit"):
            with engine.connect() as connection:
                Messages(broker, A, None).reap(connection)
                assert Messages(broker, A, None).pick(connection, 10) == []
        assert Effects(webhook).confirm(key)
        for step in (("done", row), ("in_doubt", row, ERROR, 0.0)):
            with pytest.raises(DBAPIError) as caught:
                process.do(*step)
            assert is_contention(caught.value)
        process.do("renew", [row.seq])
        other.do("reap")
        webhook.rollback()
    assert process.do("done", row)


@SYNC
@pytest.mark.parametrize("there", [True, False], ids=["present", "absent"])
def test_a_look_up_may_be_async_though_the_effect_is_not(shop: Shop, there: bool) -> None:
    async def look(payload: dict[str, str], key: str) -> bool:
        await asyncio.sleep(0)
        return there

    with scene_of(shop) as scene:
        provider = Provider(TimeoutError())

        @scene.app.effect("sms", repeat=look, settle=0.0)
        def send(payload: dict[str, str], key: str) -> None:
            provider.call(payload, key)

        scene.write(lambda connection: Effects(connection).plan(send, {"to": "1"}))
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert len(provider.calls) == (1 if there else 2)


class Later:
    """What can be awaited, and is no coroutine."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        self._call()


class Sender:
    """A provider's client, whose ways of being called are many."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def method(self, payload: dict[str, str], key: str) -> None:
        self.calls.append(payload["to"])

    async def async_method(self, payload: dict[str, str], key: str) -> None:
        await asyncio.sleep(0)
        self.calls.append(payload["to"])

    def with_client(self, payload: dict[str, str], key: str, client: str) -> None:
        self.calls.append(payload["to"])

    def returns_a_coroutine(self, payload: dict[str, str], key: str) -> Any:
        return self.async_method(payload, key)

    def returns_an_awaitable(self, payload: dict[str, str], key: str) -> Any:
        return Later(lambda: self.calls.append(payload["to"]))

    def __call__(self, payload: dict[str, str], key: str) -> None:
        self.calls.append(payload["to"])


class AsyncSender(Sender):
    async def __call__(self, payload: dict[str, str], key: str) -> None:  # type: ignore[override]  # async
        await self.async_method(payload, key)


KINDS: dict[str, Callable[[Sender], Callable[..., Any]]] = {
    "method": lambda sender: sender.method,
    "async method": lambda sender: sender.async_method,
    "partial": lambda sender: partial(sender.with_client, client="c"),
    "coroutine": lambda sender: sender.returns_a_coroutine,
    "awaitable": lambda sender: sender.returns_an_awaitable,
    "object": lambda sender: sender,
}


@core_tools.on(("sqlite", "pysqlite"))
@pytest.mark.parametrize("kind", [*KINDS, "async object"])
def test_whatever_can_be_called_can_be_an_effect(shop: Shop, kind: str) -> None:
    sender = AsyncSender() if kind == "async object" else Sender()
    function = KINDS.get(kind, KINDS["object"])(sender)
    with scene_of(shop) as scene:
        scene.app.effect("sms")(function)
        scene.write(lambda connection: Effects(connection).plan(function, {"to": "1"}))
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert sender.calls == ["1"]


def test_what_cannot_be_told_from_others_is_no_effect() -> None:
    @dataclass
    class Unhashable:
        url: str

        def __call__(self, payload: dict[str, str], key: str) -> None: ...

    with pytest.raises(SetupError, match="give it a function"):
        App("sqlite:///shop.db").effect("sms")(Unhashable("u"))


def test_a_function_is_one_effect_only() -> None:
    def send(payload: dict[str, str], key: str) -> None: ...

    App("sqlite:///shop.db").effect("sms")(send)
    App("sqlite:///other.db").effect("sms")(send)
    with pytest.raises(SetupError, match="is the effect 'sms' already"):
        App("sqlite:///third.db").effect("text")(send)


def test_a_payload_type_that_is_none_is_refused() -> None:
    def send(payload: list[str] | tuple[str, ...], key: str) -> None: ...

    def nothing(payload: dict[bytes | str, list[str] | tuple[str, ...]], key: str) -> None: ...

    app = App("sqlite:///shop.db")
    with pytest.raises(SetupError, match="payload"):
        app.effect("a")(send)
    with pytest.raises(SetupError, match="payload"):
        app.effect("b")(nothing)


def test_what_would_never_run_or_cannot_be_called_is_no_effect() -> None:
    def generator(payload: str, key: str) -> Any:
        yield key

    async def async_generator(payload: str, key: str) -> Any:
        yield key

    def keyword(payload: str, *, key: str) -> None: ...

    def named(payload: str, **key: str) -> None: ...

    def send(payload: str, key: str) -> None: ...

    app = App("sqlite:///shop.db")
    never: list[Any] = [generator, async_generator, partial(generator)]
    uncallables: list[Any] = [keyword, named, lambda payload: None]
    look_ups: list[Any] = [lambda payload: True, generator]
    for number, function in enumerate(never):
        with pytest.raises(SetupError, match="must not yield"):
            app.effect(f"never {number}")(function)
    for number, uncallable in enumerate(uncallables):
        with pytest.raises(SetupError, match="must take two arguments"):
            app.effect(f"uncallable {number}")(uncallable)
    for look_up in look_ups:
        with pytest.raises(SetupError, match=r"two arguments|must not yield"):
            app.effect("looked up", repeat=look_up)(send)


@core_tools.on(("sqlite", "pysqlite"))
def test_a_function_that_returns_a_generator_has_not_been_run(shop: Shop) -> None:
    def generator(payload: Any, key: str) -> Any:
        yield key

    def send(payload: dict[str, str], key: str) -> Any:
        return generator(payload, key)

    with scene_of(shop) as scene:
        scene.app.effect("sms")(send)
        scene.write(lambda connection: Effects(connection).plan(send, {}))
        with scene.relaying():
            eventually(lambda: [row.state for row in scene.rows()] == [IN_DOUBT])
        assert "a generator, of which nothing has run" in scene.rows()[0].error


@core_tools.on(("sqlite", "pysqlite"))
def test_the_time_before_the_first_attempt_uses_no_retries_up(shop: Shop) -> None:
    """The relay may have been away for longer than the policy goes on trying."""
    provider = Provider(NotSent("no route"))
    with scene_of(shop) as scene:
        plan_sms(scene, provider, retry=Retrying(stop=stop_after_delay(3600), wait=wait_fixed(0.1)))
        long_ago = datetime.now(UTC) - timedelta(hours=2)
        scene.write(lambda connection: connection.execute(update(TABLE).values(at=long_ago)))
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert len(provider.calls) == 2


@core_tools.on(("sqlite", "pysqlite"))
def test_when_no_thread_can_be_started_nothing_was_sent(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, list[str]()

    def few(thread: threading.Thread) -> None:
        if thread.name == "idemq-relay-sms" and type(thread) is threading.Thread and len(refused) < 3:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    provider = Provider()
    with scene_of(shop) as scene:
        plan_sms(scene, provider)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert (len(refused), len(provider.calls)) == (3, 1)


class Slow:
    """A publisher that has no answers in time for more than ten messages."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def publish(self, batch: Sequence[Any], timeout: float) -> list[str | None]:
        if len(batch) > 10:
            raise BrokerUnavailable("no answer in time")
        answers: list[str | None] = self.inner.publish(batch, timeout)
        return answers

    def close(self) -> None:
        self.inner.close()


@core_tools.on(("sqlite", "pysqlite"))
def test_of_more_than_a_broker_confirms_in_time_less_is_tried(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, make = Embedded(tmp_path / "broker.db"), Embedded.publisher
    broker.declare("q")
    monkeypatch.setattr(Embedded, "publisher", lambda self: Slow(make(self)))

    def plan_many(connection: Connection) -> None:
        for number in range(100):
            Outbox(connection).publish(broker.to("q"), b"%d" % number)

    with scene_of(shop, [broker]) as scene:
        scene.write(plan_many)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    assert broker.depth("q")[0] == 100


@core_tools.on(("sqlite", "pysqlite"))
def test_a_relay_that_cannot_get_on_says_so(
    shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("q")
    engine = create_engine(shop.url_of_driver(), connect_args={"timeout": 0.05})
    with scene_of(shop) as scene:
        scene.app = App(engine, brokers=[broker])
        scene.write(lambda connection: Outbox(connection).publish(broker.to("q"), b"1"))
        with scene.engine.connect() as holder, begin(holder), scene.relaying():
            eventually(lambda: "database is locked" in caplog.text)
        with scene.relaying():
            eventually(lambda: scene.rows() == [])
    engine.dispose()


@core_tools.on(("sqlite", "pysqlite"))
def test_an_answer_is_offered_again_before_it_is_given_up(shop: Shop, tmp_path: Path) -> None:
    broker = Embedded(tmp_path / "broker.db")
    broker.declare("q")
    with scene_of(shop, [broker]) as scene:
        question = Message(body=b"?", id="q1", headers={"reply-to": "answers", "correlation-id": 5})
        scene.write(lambda connection: Replies(broker, 1, None).first(connection, b"k" * 16, question, "yes"))
        assert [(each.name, each.kind, each.waiting) for each in scene.write(leaving)] == [
            (broker.name, "broker", 1)
        ]
        with scene.relaying():
            eventually(lambda: scene.rows()[0].error)
            broker.declare("answers")
            eventually(lambda: scene.rows() == [])
    (answer,) = received(broker.queue("answers"), 1)
    assert (answer.body, answer.headers["correlation-id"]) == (b'"yes"', "5")


@SYNC
@pytest.mark.parametrize("where", [b"\xff\xfe", b"\xed\xa0\x80", 5, ["x"]], ids=repr)
def test_a_strange_reply_to_is_the_askers_mistake(engine: Engine, tmp_path: Path, where: Any) -> None:
    embedded = Embedded(tmp_path / "broker.db")
    embedded.declare("answers")
    rabbit, kafka = RabbitMQ("amqp://guest:guest@127.0.0.1:1//"), Kafka("127.0.0.1:1")
    for broker in (embedded, rabbit, kafka):
        with begun(engine) as connection:
            replies = Replies(broker, 1, None)
            for headers in ({"reply-to": where}, {"reply-to": "answers", "correlation-id": where}):
                replies.first(connection, b"k" * 16, Message(body=b"?", headers=headers, id="q1"), "yes")
    with engine.connect() as connection:
        picked = Messages(embedded.name, A, None).pick(connection, 10)
    batch = [(row.address, row.message) for row in picked]
    publisher = embedded.publisher()
    assert len(publisher.publish(batch, 10.0)) in (1, 2)  # it is told for each of them, and raises for none
    publisher.close()
